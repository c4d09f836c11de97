// Recording, submitting, timing.
#include "vulkan/stream.hpp"

#include <utility>

namespace keyfold::vulkan {

Stream::Stream(std::shared_ptr<Device> device)
    : device_(std::move(device)),
      parts_(device_->take_stream()),
      first_(parts_->submitted),
      finished_(first_) {}

Stream::~Stream() {
  try {
    wait_for(parts_->submitted);
  } catch (...) {  // lost: nothing runs any more
    return;
  }
  if (!recording_) device_->put_back(std::move(parts_));
}

void Stream::barrier(const vk::raii::CommandBuffer& commands) {
  using Stage = vk::PipelineStageFlagBits;
  const vk::MemoryBarrier all(vk::AccessFlagBits::eMemoryWrite,
                              vk::AccessFlagBits::eMemoryRead | vk::AccessFlagBits::eMemoryWrite);
  const auto stages = Stage::eComputeShader | Stage::eTransfer;
  commands.pipelineBarrier(stages, stages | Stage::eHost, {}, all, {}, {});
}

void Stream::submit(const std::function<void(const vk::raii::CommandBuffer&)>& record) {
  const auto slot = static_cast<std::uint32_t>(parts_->submitted % StreamParts::kDepth);
  const vk::raii::CommandBuffer& commands = parts_->commands[slot];
  const bool timed = device_->traits().timestamp_bits > 0;
  recording_ = true;
  commands.begin(vk::CommandBufferBeginInfo(vk::CommandBufferUsageFlagBits::eOneTimeSubmit));
  if (timed) {
    commands.resetQueryPool(*parts_->timestamps, 2 * slot, 2);
    // At the bottom of the pipe: not before the jobs in front of this one are done.
    commands.writeTimestamp(vk::PipelineStageFlagBits::eBottomOfPipe, *parts_->timestamps,
                            2 * slot);
  }
  barrier(commands);
  record(commands);
  barrier(commands);
  if (timed) {
    commands.writeTimestamp(vk::PipelineStageFlagBits::eBottomOfPipe, *parts_->timestamps,
                            2 * slot + 1);
  }
  commands.end();
  if (parts_->submitted == finished_) last_end_ = Clock::now();
  device_->submit(*commands, *parts_->timeline, parts_->submitted + 1);
  recording_ = false;
  ++parts_->submitted;
}

void Stream::wait_for(std::uint64_t value) const {
  const vk::SemaphoreWaitInfo info({}, *parts_->timeline, value);
  while (device_->handle().waitSemaphores(info, UINT64_MAX) == vk::Result::eTimeout) continue;
}

double Stream::wait() {
  wait_for(finished_ + 1);
  const auto slot = static_cast<std::uint32_t>(finished_++ % StreamParts::kDepth);
  const Clock::time_point begin = std::exchange(last_end_, Clock::now());
  const Traits& traits = device_->traits();
  if (traits.timestamp_bits == 0) {
    return std::chrono::duration<double>(last_end_ - begin).count();
  }
  const auto [result, ticks] = parts_->timestamps.getResults<std::uint64_t>(
      2 * slot, 2, 2 * sizeof(std::uint64_t), sizeof(std::uint64_t),
      vk::QueryResultFlagBits::e64 | vk::QueryResultFlagBits::eWait);
  const std::uint64_t wrap =
      traits.timestamp_bits < 64 ? (std::uint64_t{1} << traits.timestamp_bits) - 1 : UINT64_MAX;
  return static_cast<double>((ticks[1] - ticks[0]) & wrap) * traits.timestamp_seconds;
}

}  // namespace keyfold::vulkan

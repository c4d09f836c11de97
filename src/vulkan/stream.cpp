// Recording, submitting, timing.
#include "vulkan/stream.hpp"

#include <algorithm>
#include <utility>

namespace keyfold::vulkan {
namespace {

vk::raii::Semaphore make_timeline(const vk::raii::Device& device) {
  const vk::SemaphoreTypeCreateInfo type(vk::SemaphoreType::eTimeline, 0);
  vk::SemaphoreCreateInfo info;
  info.pNext = &type;
  return {device, info};
}

}  // namespace

Stream::Stream(std::shared_ptr<Device> device, std::uint32_t depth)
    : device_(std::move(device)),
      depth_(depth),
      timeline_(make_timeline(device_->handle())),
      pool_(device_->handle(),
            vk::CommandPoolCreateInfo(vk::CommandPoolCreateFlagBits::eTransient |
                                          vk::CommandPoolCreateFlagBits::eResetCommandBuffer,
                                      device_->traits().queue_family)),
      commands_(vk::raii::CommandBuffers(
          device_->handle(),
          vk::CommandBufferAllocateInfo(*pool_, vk::CommandBufferLevel::ePrimary, depth))),
      timestamps_(device_->handle(),
                  vk::QueryPoolCreateInfo({}, vk::QueryType::eTimestamp, 2 * depth)) {}

Stream::~Stream() {
  try {
    wait_for(submitted_);
  } catch (...) {  // lost: nothing runs any more
    return;
  }
}

void Stream::barrier(const vk::raii::CommandBuffer& commands) {
  using Stage = vk::PipelineStageFlagBits;
  const vk::MemoryBarrier all(vk::AccessFlagBits::eMemoryWrite,
                              vk::AccessFlagBits::eMemoryRead | vk::AccessFlagBits::eMemoryWrite);
  const auto stages = Stage::eComputeShader | Stage::eTransfer;
  commands.pipelineBarrier(stages, stages | Stage::eHost, {}, all, {}, {});
}

void Stream::submit(const std::function<void(const vk::raii::CommandBuffer&)>& record) {
  const auto slot = static_cast<std::uint32_t>(submitted_ % depth_);
  const vk::raii::CommandBuffer& commands = commands_[slot];
  const bool timed = device_->traits().timestamp_bits > 0;
  commands.begin(vk::CommandBufferBeginInfo(vk::CommandBufferUsageFlagBits::eOneTimeSubmit));
  if (timed) {
    commands.resetQueryPool(*timestamps_, 2 * slot, 2);
    // At the bottom of the pipe: not before the jobs in front of this one are done.
    commands.writeTimestamp(vk::PipelineStageFlagBits::eBottomOfPipe, *timestamps_, 2 * slot);
  }
  barrier(commands);
  record(commands);
  barrier(commands);
  if (timed) {
    commands.writeTimestamp(vk::PipelineStageFlagBits::eBottomOfPipe, *timestamps_, 2 * slot + 1);
  }
  commands.end();
  if (submitted_ == finished_) last_end_ = Clock::now();
  device_->submit(*commands, *timeline_, submitted_ + 1);
  ++submitted_;
}

void Stream::wait_for(std::uint64_t value) const {
  const vk::SemaphoreWaitInfo info({}, *timeline_, value);
  while (device_->handle().waitSemaphores(info, UINT64_MAX) == vk::Result::eTimeout) continue;
}

double Stream::wait() {
  wait_for(finished_ + 1);
  const auto slot = static_cast<std::uint32_t>(finished_++ % depth_);
  const Clock::time_point begin = std::exchange(last_end_, Clock::now());
  const Traits& traits = device_->traits();
  if (traits.timestamp_bits == 0) {
    return std::chrono::duration<double>(last_end_ - begin).count();
  }
  const auto [result, ticks] = timestamps_.getResults<std::uint64_t>(
      2 * slot, 2, 2 * sizeof(std::uint64_t), sizeof(std::uint64_t),
      vk::QueryResultFlagBits::e64 | vk::QueryResultFlagBits::eWait);
  const std::uint64_t wrap =
      traits.timestamp_bits < 64 ? (std::uint64_t{1} << traits.timestamp_bits) - 1 : UINT64_MAX;
  return static_cast<double>((ticks[1] - ticks[0]) & wrap) * traits.timestamp_seconds;
}

}  // namespace keyfold::vulkan

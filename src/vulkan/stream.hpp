// Submissions of one run, in order: each is one job of the queue, timed by the device.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/device.hpp"

namespace keyfold::vulkan {

class Stream {
 public:
  /// At most `depth` submissions are in flight.
  Stream(std::shared_ptr<Device> device, std::uint32_t depth);
  /// Waits for what is in flight.
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Submits what `record` records, as a job of its own.
  void submit(const std::function<void(const vk::raii::CommandBuffer&)>& record);
  /// Waits for the oldest submission; returns the seconds that it took on the device, without those
  /// that it waited for the jobs before it.
  double wait();

  std::uint64_t submitted() const { return submitted_; }
  std::uint64_t finished() const { return finished_; }

  /// What comes later sees what came before it, by kernels and copies alike.
  static void barrier(const vk::raii::CommandBuffer& commands);

 private:
  using Clock = std::chrono::steady_clock;
  void wait_for(std::uint64_t value) const;

  std::shared_ptr<Device> device_;
  std::uint32_t depth_;
  vk::raii::Semaphore timeline_;  // counts finished submissions
  vk::raii::CommandPool pool_;
  std::vector<vk::raii::CommandBuffer> commands_;  // of submission i: i % depth
  vk::raii::QueryPool timestamps_;                 // begin and end of each
  std::uint64_t submitted_ = 0, finished_ = 0;
  Clock::time_point last_end_;  // where the queue has no timestamps
};

}  // namespace keyfold::vulkan

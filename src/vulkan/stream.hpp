// Submissions of one run, in order: each is one job of the queue, timed by the device.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/device.hpp"

namespace keyfold::vulkan {

class Stream {
 public:
  /// At most StreamParts::kDepth submissions are in flight.
  explicit Stream(std::shared_ptr<Device> device);
  /// Waits for what is in flight.
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Submits what `record` records, as a job of its own.
  void submit(const std::function<void(const vk::raii::CommandBuffer&)>& record);
  /// Waits for the oldest submission; returns the seconds that it took on the device, without those
  /// that it waited for the jobs before it.
  double wait();

  /// Since the stream began.
  std::uint64_t submitted() const { return parts_->submitted - first_; }

  /// What comes later sees what came before it, by kernels and copies alike.
  static void barrier(const vk::raii::CommandBuffer& commands);

 private:
  using Clock = std::chrono::steady_clock;
  void wait_for(std::uint64_t value) const;

  std::shared_ptr<Device> device_;
  std::unique_ptr<StreamParts> parts_;
  std::uint64_t first_, finished_;  // counted as the parts do
  bool recording_ = false;          // or an exception came in between
  Clock::time_point last_end_;      // where the queue has no timestamps
};

}  // namespace keyfold::vulkan

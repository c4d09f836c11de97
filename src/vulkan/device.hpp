// A logical device: its queue, its memory and its pipelines. Made anew when it is lost.
#pragma once

#include <memory>
#include <mutex>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

#include "gpu/layout.hpp"
#include "vulkan/buffer.hpp"
#include "vulkan/pipelines.hpp"
#include "vulkan/traits.hpp"

namespace keyfold::vulkan {

/// What a Stream works with: kept from run to run, as making it takes longer than a short call.
struct StreamParts {
  StreamParts(const vk::raii::Device& device, std::uint32_t queue_family);

  static constexpr std::uint32_t kDepth = gpu::kFrames;  ///< submissions in flight

  vk::raii::Semaphore timeline;  ///< counts finished submissions
  vk::raii::CommandPool pool;
  std::vector<vk::raii::CommandBuffer> commands;  ///< of submission i: i % kDepth
  vk::raii::QueryPool timestamps;                 ///< begin and end of each
  std::uint64_t submitted = 0;
};

class Device {
 public:
  Device(const vk::raii::PhysicalDevice& physical, const Traits& traits);

  const Traits& traits() const { return traits_; }
  const vk::raii::Device& handle() const { return device_; }
  BufferPool& buffers() { return buffers_; }
  Pipelines& pipelines() { return pipelines_; }
  std::unique_ptr<StreamParts> take_stream();
  /// All that was submitted with it is done.
  void put_back(std::unique_ptr<StreamParts> parts) noexcept;
  /// Queues a command buffer that sets the timeline semaphore to `value` when it is done.
  void submit(vk::CommandBuffer commands, vk::Semaphore timeline, std::uint64_t value);

 private:
  Traits traits_;
  vk::raii::Device device_;
  vk::raii::Queue queue_;
  std::mutex queue_mutex_;
  BufferPool buffers_;
  Pipelines pipelines_;
  std::mutex streams_mutex_;
  std::vector<std::unique_ptr<StreamParts>> idle_streams_;
};

/// A buffer on loan from its device's pool.
class BufferLease {
 public:
  BufferLease() = default;
  BufferLease(std::shared_ptr<Device> device, Use use, std::int64_t size)
      : device_(std::move(device)), buffer_(device_->buffers().take(use, size)) {}
  BufferLease(BufferLease&&) noexcept = default;
  BufferLease& operator=(BufferLease&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  ~BufferLease() {
    if (buffer_) device_->buffers().put_back(std::move(buffer_));
  }

  explicit operator bool() const { return buffer_ != nullptr; }
  const Buffer* operator->() const { return buffer_.get(); }

 private:
  std::shared_ptr<Device> device_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace keyfold::vulkan

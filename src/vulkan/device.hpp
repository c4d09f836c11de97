// A logical device: its queue, its memory and its pipelines. Made anew when it is lost.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
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
  /// What was found out about the device by running something on it.
  struct Known {
    std::mutex mutex;
    std::optional<std::uint32_t> pairs;  ///< see row_pairs()
  };
  Known& known() { return known_; }
  std::unique_ptr<StreamParts> take_stream();
  /// All that was submitted with it is done.
  void put_back(std::unique_ptr<StreamParts> parts) noexcept {
    idle_streams_.put_back(std::move(parts));
  }
  /// Queues a command buffer that sets the timeline semaphore to `value` when it is done.
  void submit(vk::CommandBuffer commands, vk::Semaphore timeline, std::uint64_t value);

 private:
  Traits traits_;
  vk::raii::Device device_;
  vk::raii::Queue queue_;
  std::mutex queue_mutex_;
  BufferPool buffers_;
  Pipelines pipelines_;
  Known known_;
  gpu::Idle<StreamParts> idle_streams_;
};

/// A buffer on loan from its device's pool.
using BufferLease = gpu::Lease<Device, Buffer>;

}  // namespace keyfold::vulkan

// Memory of a device, reused from call to call.
#pragma once

#include <cstdint>
#include <memory>
#include <vulkan/vulkan_raii.hpp>

#include "gpu/idle.hpp"
#include "gpu/params.hpp"

namespace keyfold::vulkan {

using gpu::Address;
using gpu::Params;

/// What a buffer is for; decides which memory it gets.
enum class Use : std::uint8_t {
  kKernels,   ///< the device's fastest memory
  kUpload,    ///< written by the host in order, read by the device
  kReadback,  ///< written by the device, read by the host
  kShared,    ///< as kKernels, and written by the host: devices that share the host's memory
};

struct Buffer {
  Use use = Use::kKernels;
  std::int64_t size = 0;
  vk::raii::DeviceMemory memory = nullptr;
  vk::raii::Buffer handle = nullptr;
  Address address = 0;
  std::byte* host = nullptr;  ///< mapped, except kKernels
};

/// Buffers that nobody uses now are kept, up to a limit, as allocating takes longer than a short
/// call. Used by all threads.
class BufferPool {
 public:
  BufferPool(const vk::raii::PhysicalDevice& physical, const vk::raii::Device& device);

  /// A buffer of at least `size` > 0 bytes. Throws vk::OutOfDeviceMemoryError.
  std::unique_ptr<Buffer> take(Use use, std::int64_t size);
  void put_back(std::unique_ptr<Buffer> buffer) noexcept { idle_.put_back(std::move(buffer)); }
  /// A buffer that never comes from the pool nor goes there.
  std::unique_ptr<Buffer> allocate(Use use, std::int64_t size);

 private:
  std::uint32_t memory_type(Use use, std::uint32_t allowed) const;

  vk::PhysicalDeviceMemoryProperties types_;
  const vk::raii::Device& device_;
  gpu::IdleBuffers<Buffer> idle_;
};

}  // namespace keyfold::vulkan

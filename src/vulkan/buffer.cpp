// Allocation and reuse of device memory.
#include "vulkan/buffer.hpp"

#include <array>
#include <utility>

namespace keyfold::vulkan {
namespace {

using Property = vk::MemoryPropertyFlagBits;

/// The properties that a use asks for, the best first.
std::array<vk::MemoryPropertyFlags, 2> wanted(Use use) {
  const auto mapped = Property::eHostVisible | Property::eHostCoherent;
  switch (use) {
    case Use::kKernels: return {Property::eDeviceLocal, {}};
    case Use::kUpload: return {mapped, mapped};
    case Use::kReadback: return {mapped | Property::eHostCached, mapped};
    case Use::kShared: return {mapped | Property::eDeviceLocal, mapped};
  }
  return {};
}

}  // namespace

BufferPool::BufferPool(const vk::raii::PhysicalDevice& physical, const vk::raii::Device& device)
    : types_(physical.getMemoryProperties()), device_(device) {}

std::uint32_t BufferPool::memory_type(Use use, std::uint32_t allowed) const {
  for (const vk::MemoryPropertyFlags& properties : wanted(use)) {
    for (std::uint32_t i = 0; i < types_.memoryTypeCount; ++i) {
      if ((allowed >> i & 1) && (types_.memoryTypes[i].propertyFlags & properties) == properties) {
        return i;
      }
    }
  }
  throw vk::OutOfDeviceMemoryError("no memory type fits");
}

std::unique_ptr<Buffer> BufferPool::allocate(Use use, std::int64_t size) {
  using Usage = vk::BufferUsageFlagBits;
  auto buffer = std::make_unique<Buffer>();
  buffer->use = use;
  buffer->size = gpu::IdleBuffers<Buffer>::rounded(size);
  const auto bytes = static_cast<vk::DeviceSize>(buffer->size);
  buffer->handle = {device_,
                    vk::BufferCreateInfo({}, bytes,
                                         Usage::eStorageBuffer | Usage::eTransferSrc |
                                             Usage::eTransferDst | Usage::eShaderDeviceAddress)};
  const vk::MemoryRequirements needs = buffer->handle.getMemoryRequirements();
  const vk::MemoryAllocateFlagsInfo flags(vk::MemoryAllocateFlagBits::eDeviceAddress);
  buffer->memory = {
      device_, vk::MemoryAllocateInfo(needs.size, memory_type(use, needs.memoryTypeBits), &flags)};
  buffer->handle.bindMemory(*buffer->memory, 0);
  buffer->address = device_.getBufferAddress({*buffer->handle});
  if (use != Use::kKernels) {
    buffer->host = static_cast<std::byte*>(buffer->memory.mapMemory(0, VK_WHOLE_SIZE));
  }
  return buffer;
}

std::unique_ptr<Buffer> BufferPool::take(Use use, std::int64_t size) {
  if (auto found = idle_.take(use, size)) return found;
  try {
    return allocate(use, size);
  } catch (const vk::OutOfDeviceMemoryError&) {
    idle_.clear();
  }
  return allocate(use, size);
}

}  // namespace keyfold::vulkan

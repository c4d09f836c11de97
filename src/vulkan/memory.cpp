// Device buffers: copies by way of host memory that the device reads and writes.
#include "vulkan/memory.hpp"

#include <algorithm>
#include <cstring>

#include "vulkan/errors.hpp"
#include "vulkan/stream.hpp"

namespace keyfold::vulkan {
namespace {

constexpr std::int64_t kPieceBytes = 16 << 20;

vk::BufferCopy region(std::int64_t from, std::int64_t to, std::int64_t bytes) {
  return {static_cast<vk::DeviceSize>(from), static_cast<vk::DeviceSize>(to),
          static_cast<vk::DeviceSize>(bytes)};
}

}  // namespace

VulkanMemory::VulkanMemory(Gpu& gpu, std::int64_t bytes) : gpu_(gpu) {
  guard_begin(gpu, [&](const std::shared_ptr<Device>& device) {
    device_ = device;
    buffer_ = device_->buffers().allocate(
        device_->traits().shared_memory ? Use::kShared : Use::kKernels, bytes);
  });
}

void VulkanMemory::check_on(const std::shared_ptr<Device>& device) const {
  if (device == device_) return;
  throw RunError(ErrorCode::kDeviceFailure,
                 "the device that held this buffer was lost, and its contents with it; make the "
                 "buffer again, or pass keys in host memory, which survive such a loss");
}

Address VulkanMemory::address_on(const std::shared_ptr<Device>& device) const {
  check_on(device);
  return buffer_->address;
}

void VulkanMemory::upload(std::int64_t offset, const void* from, std::int64_t bytes) {
  check_on(gpu_.device());
  if (buffer_->host) {
    std::memcpy(buffer_->host + offset, from, static_cast<std::size_t>(bytes));
    return;
  }
  guard_run(gpu_, device_, [&] {
    const BufferLease piece(device_, Use::kUpload, std::min(bytes, kPieceBytes));
    Stream stream(device_);
    for (std::int64_t at = 0; at < bytes; at += kPieceBytes) {
      const std::int64_t size = std::min(kPieceBytes, bytes - at);
      std::memcpy(piece->host, static_cast<const std::byte*>(from) + at,
                  static_cast<std::size_t>(size));
      stream.submit([&](const vk::raii::CommandBuffer& commands) {
        commands.copyBuffer(*piece->handle, *buffer_->handle, region(0, offset + at, size));
      });
      stream.wait();
    }
  });
}

void VulkanMemory::download(std::int64_t offset, void* to, std::int64_t bytes) const {
  check_on(gpu_.device());
  if (buffer_->host) {
    std::memcpy(to, buffer_->host + offset, static_cast<std::size_t>(bytes));
    return;
  }
  guard_run(gpu_, device_, [&] {
    const BufferLease piece(device_, Use::kReadback, std::min(bytes, kPieceBytes));
    Stream stream(device_);
    for (std::int64_t at = 0; at < bytes; at += kPieceBytes) {
      const std::int64_t size = std::min(kPieceBytes, bytes - at);
      stream.submit([&](const vk::raii::CommandBuffer& commands) {
        commands.copyBuffer(*buffer_->handle, *piece->handle, region(offset + at, 0, size));
      });
      stream.wait();
      std::memcpy(static_cast<std::byte*>(to) + at, piece->host, static_cast<std::size_t>(size));
    }
  });
}

}  // namespace keyfold::vulkan

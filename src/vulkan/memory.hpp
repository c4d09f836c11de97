// Keys and values that stay on the device: what is behind a DeviceBuffer.
#pragma once

#include "core/backend.hpp"
#include "vulkan/gpu.hpp"

namespace keyfold::vulkan {

/// Lost with its device: a later device does not have what was in it.
class VulkanMemory : public core::DeviceMemory {
 public:
  VulkanMemory(Gpu& gpu, std::int64_t bytes);

  void upload(std::int64_t offset, const void* from, std::int64_t bytes) override;
  void download(std::int64_t offset, void* to, std::int64_t bytes) const override;

  /// Its address on this device. Throws RunError when it was lost with another.
  Address address_on(const std::shared_ptr<Device>& device) const;

 private:
  void check_on(const std::shared_ptr<Device>& device) const;

  Gpu& gpu_;
  std::shared_ptr<Device> device_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace keyfold::vulkan

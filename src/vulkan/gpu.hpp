// One GPU of the machine, and the logical device that is in use now.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "vulkan/device.hpp"
#include "vulkan/instance.hpp"

namespace keyfold::vulkan {

class Gpu {
 public:
  Gpu(std::shared_ptr<const Instance> instance, vk::raii::PhysicalDevice physical);

  const Traits& traits() const { return traits_; }
  /// The logical device, made at the first use and again after it was lost.
  std::shared_ptr<Device> device();
  /// Not to be used any more: device() makes a new one. Others may have said so before.
  void give_up(const std::shared_ptr<Device>& device);

 private:
  std::shared_ptr<const Instance> instance_;
  vk::raii::PhysicalDevice physical_;
  Traits traits_;
  std::mutex mutex_;
  std::shared_ptr<Device> device_;
};

}  // namespace keyfold::vulkan

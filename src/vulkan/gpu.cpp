// The logical device in use.
#include "vulkan/gpu.hpp"

#include <utility>

namespace keyfold::vulkan {

Gpu::Gpu(std::shared_ptr<const Instance> instance, vk::raii::PhysicalDevice physical)
    : instance_(std::move(instance)),
      physical_(std::move(physical)),
      traits_(*Traits::of(instance_->handle(), physical_)) {}

std::shared_ptr<Device> Gpu::device() {
  const std::lock_guard lock(mutex_);
  if (!device_) device_ = std::make_shared<Device>(physical_, traits_);
  return device_;
}

void Gpu::give_up(const std::shared_ptr<Device>& device) {
  const std::lock_guard lock(mutex_);
  if (device_ == device) device_.reset();
}

}  // namespace keyfold::vulkan

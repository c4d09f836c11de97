// The Vulkan loader, opened at run time, and the GPUs that it finds.
#pragma once

#include <memory>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

namespace keyfold::vulkan {

class Instance {
 public:
  /// nullptr where no loader or no driver is installed.
  static std::shared_ptr<const Instance> open();

  Instance();

  const vk::raii::Instance& handle() const { return instance_; }
  /// Those that can run keyfold's kernels, the fastest kind first: discrete, integrated, virtual,
  /// software.
  std::vector<vk::raii::PhysicalDevice> devices() const;

 private:
  vk::raii::Context context_;
  vk::raii::Instance instance_;
};

}  // namespace keyfold::vulkan

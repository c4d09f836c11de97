// Opening the loader.
#include "vulkan/instance.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "vulkan/traits.hpp"

namespace keyfold::vulkan {
namespace {

vk::raii::Instance make_instance(const vk::raii::Context& context) {
  const vk::ApplicationInfo application("keyfold", 0, "keyfold", 0, VK_API_VERSION_1_3);
  std::vector<const char*> extensions;
  vk::InstanceCreateFlags flags;
  for (const auto& extension : context.enumerateInstanceExtensionProperties()) {
    // Layered drivers, such as MoltenVK, are listed only to those who ask for them.
    if (std::strcmp(extension.extensionName, VK_KHR_PORTABILITY_ENUMERATION_EXTENSION_NAME) == 0) {
      extensions.push_back(VK_KHR_PORTABILITY_ENUMERATION_EXTENSION_NAME);
      flags |= vk::InstanceCreateFlagBits::eEnumeratePortabilityKHR;
    }
  }
  return {context, vk::InstanceCreateInfo(flags, &application, {}, extensions)};
}

int rank(const vk::raii::PhysicalDevice& device) {
  switch (device.getProperties().deviceType) {
    case vk::PhysicalDeviceType::eDiscreteGpu: return 0;
    case vk::PhysicalDeviceType::eIntegratedGpu: return 1;
    case vk::PhysicalDeviceType::eVirtualGpu: return 2;
    default: return 3;
  }
}

}  // namespace

std::shared_ptr<const Instance> Instance::open() {
  try {
    return std::make_shared<const Instance>();
  } catch (const std::runtime_error&) {  // no loader, or none of its drivers answers
    return nullptr;
  }
}

Instance::Instance() : instance_(make_instance(context_)) {}

std::vector<vk::raii::PhysicalDevice> Instance::devices() const {
  std::vector<vk::raii::PhysicalDevice> usable;
  for (vk::raii::PhysicalDevice& device : vk::raii::PhysicalDevices(instance_)) {
    if (Traits::of(instance_, device)) usable.push_back(std::move(device));
  }
  std::ranges::stable_sort(usable, {}, rank);
  return usable;
}

}  // namespace keyfold::vulkan

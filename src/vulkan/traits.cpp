// Asking a GPU.
#include "vulkan/traits.hpp"

#include <algorithm>
#include <cstring>

namespace keyfold::vulkan {
namespace {

using Queue = vk::QueueFlagBits;

/// A family for compute alone, if there is one: its jobs do not stand in a desktop's way.
std::optional<std::uint32_t> compute_family(
    const std::vector<vk::QueueFamilyProperties>& families) {
  std::optional<std::uint32_t> found;
  for (std::uint32_t i = 0; i < families.size(); ++i) {
    if (!(families[i].queueFlags & Queue::eCompute)) continue;
    const bool alone = !(families[i].queueFlags & Queue::eGraphics);
    if (alone && families[i].timestampValidBits > 0) return i;
    if (!found) found = i;
  }
  return found;
}

}  // namespace

std::optional<Traits> Traits::of(const vk::raii::Instance& instance,
                                 const vk::raii::PhysicalDevice& device) {
  if (device.getProperties().apiVersion < VK_API_VERSION_1_2) return std::nullopt;

  const auto features =
      device.getFeatures2<vk::PhysicalDeviceFeatures2, vk::PhysicalDeviceVulkan12Features>();
  const auto& core = features.get<vk::PhysicalDeviceFeatures2>().features;
  const auto& more = features.get<vk::PhysicalDeviceVulkan12Features>();
  if (!core.shaderInt64 || !more.timelineSemaphore || !more.bufferDeviceAddress ||
      !more.scalarBlockLayout) {
    return std::nullopt;
  }
  const auto properties =
      device.getProperties2<vk::PhysicalDeviceProperties2, vk::PhysicalDeviceVulkan11Properties,
                            vk::PhysicalDeviceVulkan12Properties>();
  const auto& limits = properties.get<vk::PhysicalDeviceProperties2>().properties;
  const auto& subgroups = properties.get<vk::PhysicalDeviceVulkan11Properties>();
  const auto& driver = properties.get<vk::PhysicalDeviceVulkan12Properties>();
  using Subgroup = vk::SubgroupFeatureFlagBits;
  const auto needed = Subgroup::eBasic | Subgroup::eShuffle;
  if ((subgroups.subgroupSupportedOperations & needed) != needed ||
      !(subgroups.subgroupSupportedStages & vk::ShaderStageFlagBits::eCompute)) {
    return std::nullopt;
  }
  const auto families = device.getQueueFamilyProperties();
  const auto family = compute_family(families);
  if (!family) return std::nullopt;

  Traits t;
  t.name = limits.deviceName.data();
  t.driver = std::string(driver.driverName.data()) + " " + driver.driverInfo.data();
  t.type = limits.deviceType;
  t.driver_id = driver.driverID;
  t.queue_family = *family;
  t.timestamp_bits = families[*family].timestampValidBits;
  t.timestamp_seconds = static_cast<double>(limits.limits.timestampPeriod) * 1e-9;
  t.subgroup_size = subgroups.subgroupSize;
  t.max_shared_bytes = limits.limits.maxComputeSharedMemorySize;
  t.max_invocations = std::min(limits.limits.maxComputeWorkGroupInvocations,
                               limits.limits.maxComputeWorkGroupSize[0]);
  t.max_groups_z = limits.limits.maxComputeWorkGroupCount[2];
  const auto extensions = device.enumerateDeviceExtensionProperties();
  const auto has = [&](const char* wanted) {
    return std::ranges::any_of(extensions, [&](const vk::ExtensionProperties& extension) {
      return std::strcmp(extension.extensionName, wanted) == 0;
    });
  };
  t.portability = has("VK_KHR_portability_subset");
  if (has(VK_NV_SHADER_SM_BUILTINS_EXTENSION_NAME)) {
    t.processors = device
                       .getProperties2<vk::PhysicalDeviceProperties2,
                                       vk::PhysicalDeviceShaderSMBuiltinsPropertiesNV>()
                       .get<vk::PhysicalDeviceShaderSMBuiltinsPropertiesNV>()
                       .shaderSMCount;
  }
  if (has(VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME)) {
    const auto control = device
                             .getFeatures2<vk::PhysicalDeviceFeatures2,
                                           vk::PhysicalDeviceSubgroupSizeControlFeatures>()
                             .get<vk::PhysicalDeviceSubgroupSizeControlFeatures>();
    const auto sizes = device
                           .getProperties2<vk::PhysicalDeviceProperties2,
                                           vk::PhysicalDeviceSubgroupSizeControlProperties>()
                           .get<vk::PhysicalDeviceSubgroupSizeControlProperties>();
    t.pins_subgroup_size = control.subgroupSizeControl && control.computeFullSubgroups &&
                           (sizes.requiredSubgroupSizeStages & vk::ShaderStageFlagBits::eCompute);
  }
  if (t.pins_subgroup_size && more.vulkanMemoryModel && more.shaderFloat16 &&
      (subgroups.subgroupSupportedOperations & Subgroup::eVote)) {
    t.matrices = matrix_traits(instance, device, has);
    // Their shaders are SPIR-V 1.6.
    t.matrices.nv2 &= device.getProperties().apiVersion >= VK_API_VERSION_1_3;
  }
  const auto memory = device.getMemoryProperties();
  for (std::uint32_t i = 0; i < memory.memoryHeapCount; ++i) {
    if (memory.memoryHeaps[i].flags & vk::MemoryHeapFlagBits::eDeviceLocal) {
      t.memory_bytes =
          std::max(t.memory_bytes, static_cast<std::int64_t>(memory.memoryHeaps[i].size));
    }
  }
  t.shared_memory =
      t.type == vk::PhysicalDeviceType::eIntegratedGpu || t.type == vk::PhysicalDeviceType::eCpu;
  return t;
}

}  // namespace keyfold::vulkan

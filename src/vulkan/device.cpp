// Making a logical device.
#include "vulkan/device.hpp"

#include <utility>
#include <vector>

namespace keyfold::vulkan {
namespace {

vk::raii::Device make_device(const vk::raii::PhysicalDevice& physical, const Traits& traits) {
  constexpr float kPriority = 1;
  const vk::DeviceQueueCreateInfo queue({}, traits.queue_family, 1, &kPriority);
  std::vector<const char*> extensions;
  if (traits.portability) extensions.push_back("VK_KHR_portability_subset");

  vk::PhysicalDeviceFeatures2 features;
  features.features.shaderInt64 = true;
  vk::PhysicalDeviceVulkan12Features more;
  more.timelineSemaphore = more.bufferDeviceAddress = more.scalarBlockLayout = true;
  more.vulkanMemoryModel = more.shaderFloat16 = traits.matrices.any();
  features.pNext = &more;
  vk::PhysicalDeviceSubgroupSizeControlFeatures sizes;
  if (traits.pins_subgroup_size) {
    sizes.subgroupSizeControl = sizes.computeFullSubgroups = true;
    more.pNext = &sizes;
    extensions.push_back(VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME);
  }
  MatrixFeatures matrices(traits.matrices);
  more.pNext = matrices.chain(traits.matrices, more.pNext);
  vk::PhysicalDeviceMaintenance4Features maintenance(true);  // SPIR-V 1.6 has LocalSizeId
  if (traits.matrices.nv2) maintenance.pNext = std::exchange(more.pNext, &maintenance);
  for (const char* name : traits.matrices.extensions()) extensions.push_back(name);
  vk::DeviceCreateInfo info({}, queue, {}, extensions);
  info.pNext = &features;
  return {physical, info};
}

vk::raii::Semaphore make_timeline(const vk::raii::Device& device) {
  const vk::SemaphoreTypeCreateInfo type(vk::SemaphoreType::eTimeline, 0);
  vk::SemaphoreCreateInfo info;
  info.pNext = &type;
  return {device, info};
}

}  // namespace

StreamParts::StreamParts(const vk::raii::Device& device, std::uint32_t queue_family)
    : timeline(make_timeline(device)),
      pool(device, vk::CommandPoolCreateInfo(vk::CommandPoolCreateFlagBits::eTransient |
                                                 vk::CommandPoolCreateFlagBits::eResetCommandBuffer,
                                             queue_family)),
      commands(vk::raii::CommandBuffers(
          device, vk::CommandBufferAllocateInfo(*pool, vk::CommandBufferLevel::ePrimary, kDepth))),
      timestamps(device, vk::QueryPoolCreateInfo({}, vk::QueryType::eTimestamp, 2 * kDepth)) {}

Device::Device(const vk::raii::PhysicalDevice& physical, const Traits& traits)
    : traits_(traits),
      device_(make_device(physical, traits)),
      queue_(device_, traits.queue_family, 0),
      buffers_(physical, device_),
      pipelines_(traits_, physical, device_) {}

std::unique_ptr<StreamParts> Device::take_stream() {
  if (auto found = idle_streams_.take()) return found;
  return std::make_unique<StreamParts>(device_, traits_.queue_family);
}

void Device::submit(vk::CommandBuffer commands, vk::Semaphore timeline, std::uint64_t value) {
  const vk::TimelineSemaphoreSubmitInfo values({}, value);
  vk::SubmitInfo info({}, {}, commands, timeline);
  info.pNext = &values;
  const std::lock_guard lock(queue_mutex_);
  queue_.submit(info);
}

}  // namespace keyfold::vulkan

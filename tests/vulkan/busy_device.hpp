// A Vulkan device and a shader that is busy for as long as a test wants.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

#include "busy.comp.hpp"

namespace keyfold::watchdog {

/// A device, its queue and a timeline semaphore that each submission raises by one.
class BusyDevice {
 public:
  static constexpr std::uint64_t kPatience = 10'000'000'000;  // ns
  static constexpr std::uint32_t kRow = 1024;

  explicit BusyDevice(const vk::raii::PhysicalDevice& physical)
      : family_(compute_family(physical)),
        synchronization2_(physical
                              .getFeatures2<vk::PhysicalDeviceFeatures2,
                                            vk::PhysicalDeviceSynchronization2Features>()
                              .get<vk::PhysicalDeviceSynchronization2Features>()
                              .synchronization2),
        device_(make_device(physical)),
        queue_(device_, family_, 0),
        buffer_(device_, vk::BufferCreateInfo({}, 4,
                                              vk::BufferUsageFlagBits::eShaderDeviceAddress |
                                                  vk::BufferUsageFlagBits::eTransferDst)),
        memory_(allocate()),
        layout_(make_layout()),
        pipeline_(make_pipeline()),
        timeline_(make_timeline()),
        pool_(device_, vk::CommandPoolCreateInfo({}, family_)) {}

  const vk::raii::Device& device() const { return device_; }
  const vk::raii::Queue& queue() const { return queue_; }
  vk::Buffer buffer() const { return *buffer_; }
  bool synchronization2() const { return synchronization2_; }
  std::uint64_t last() const { return last_; }

  vk::raii::CommandBuffer commands() const {
    vk::raii::CommandBuffers made(device_, {*pool_, vk::CommandBufferLevel::ePrimary, 1});
    return std::move(made.front());
  }

  /// Commands that run this many groups of the shader. They live as long as the BusyDevice.
  vk::CommandBuffer busy(std::uint32_t groups) {
    const vk::raii::CommandBuffer& made = commands_.emplace_back(commands());
    made.begin({});
    const vk::MemoryBarrier barrier(
        vk::AccessFlagBits::eShaderWrite,
        vk::AccessFlagBits::eShaderRead | vk::AccessFlagBits::eShaderWrite);
    made.pipelineBarrier(vk::PipelineStageFlagBits::eComputeShader,
                         vk::PipelineStageFlagBits::eComputeShader, {}, barrier, {}, {});
    made.bindPipeline(vk::PipelineBindPoint::eCompute, *pipeline_);
    made.pushConstants<vk::DeviceAddress>(*layout_, vk::ShaderStageFlagBits::eCompute, 0,
                                          device_.getBufferAddress({*buffer_}));
    made.dispatch(std::min(groups, kRow), (groups + kRow - 1) / kRow, 1);
    made.end();
    return *made;
  }

  /// Returns the value that the timeline reaches then.
  std::uint64_t submit(std::uint32_t groups, vk::Fence fence = {}) {
    const vk::CommandBuffer commands = busy(groups);
    const std::uint64_t value = last_ + 1;
    const vk::TimelineSemaphoreSubmitInfo timeline({}, value);
    vk::SubmitInfo info({}, {}, commands, *timeline_);
    info.pNext = &timeline;
    queue_.submit(info, fence);
    return last_ = value;
  }

  std::uint64_t submit2(std::uint32_t groups) {
    const vk::CommandBufferSubmitInfo commands(busy(groups));
    const vk::SemaphoreSubmitInfo signal(*timeline_, last_ + 1,
                                         vk::PipelineStageFlagBits2::eAllCommands);
    queue_.submit2(vk::SubmitInfo2({}, {}, commands, signal));
    return ++last_;
  }

  std::uint64_t counter() const { return timeline_.getCounterValue(); }

  vk::Result wait(std::uint64_t value, std::uint64_t timeout = kPatience) const {
    return device_.waitSemaphores({{}, *timeline_, value}, timeout);
  }

 private:
  static std::uint32_t compute_family(const vk::raii::PhysicalDevice& physical) {
    const auto families = physical.getQueueFamilyProperties();
    for (std::uint32_t i = 0; i < families.size(); ++i)
      if (families[i].queueFlags & vk::QueueFlagBits::eCompute) return i;
    throw std::runtime_error("the device does not compute");
  }

  vk::raii::Device make_device(const vk::raii::PhysicalDevice& physical) const {
    const float priority = 1;
    const vk::DeviceQueueCreateInfo queue({}, family_, 1, &priority);
    vk::PhysicalDeviceVulkan12Features features;
    features.timelineSemaphore = true;
    features.bufferDeviceAddress = true;
    vk::PhysicalDeviceSynchronization2Features newer(true);
    if (synchronization2_) features.pNext = &newer;
    vk::DeviceCreateInfo info({}, queue);
    info.pNext = &features;
    return {physical, info};
  }

  vk::raii::DeviceMemory allocate() const {
    const vk::MemoryRequirements needs = buffer_.getMemoryRequirements();
    std::uint32_t type = 0;
    while ((needs.memoryTypeBits >> type & 1) == 0) ++type;
    const vk::MemoryAllocateFlagsInfo flags(vk::MemoryAllocateFlagBits::eDeviceAddress);
    vk::MemoryAllocateInfo info(needs.size, type);
    info.pNext = &flags;
    vk::raii::DeviceMemory memory(device_, info);
    buffer_.bindMemory(*memory, 0);
    return memory;
  }

  vk::raii::PipelineLayout make_layout() const {
    const vk::PushConstantRange range(vk::ShaderStageFlagBits::eCompute, 0,
                                      sizeof(vk::DeviceAddress));
    return {device_, vk::PipelineLayoutCreateInfo({}, {}, range)};
  }

  vk::raii::Pipeline make_pipeline() const {
    const vk::raii::ShaderModule module(
        device_, vk::ShaderModuleCreateInfo({}, sizeof(shaders::busy_comp), shaders::busy_comp));
    const vk::PipelineShaderStageCreateInfo stage({}, vk::ShaderStageFlagBits::eCompute, *module,
                                                  "main");
    return {device_, nullptr, vk::ComputePipelineCreateInfo({}, stage, *layout_)};
  }

  vk::raii::Semaphore make_timeline() const {
    const vk::SemaphoreTypeCreateInfo type(vk::SemaphoreType::eTimeline, 0);
    vk::SemaphoreCreateInfo info;
    info.pNext = &type;
    return {device_, info};
  }

  std::uint32_t family_;
  bool synchronization2_;
  vk::raii::Device device_;
  vk::raii::Queue queue_;
  vk::raii::Buffer buffer_;
  vk::raii::DeviceMemory memory_;
  vk::raii::PipelineLayout layout_;
  vk::raii::Pipeline pipeline_;
  vk::raii::Semaphore timeline_;
  vk::raii::CommandPool pool_;
  std::vector<vk::raii::CommandBuffer> commands_;
  std::uint64_t last_ = 0;
};

}  // namespace keyfold::watchdog

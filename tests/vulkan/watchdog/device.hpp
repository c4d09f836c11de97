// One VkDevice under the watchdog: its submissions are timed on the device, and one that takes too
// long loses it.
#pragma once

#include <vulkan/vk_layer.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "settings.hpp"

namespace keyfold::watchdog {

/// The next layer's or the driver's functions that this layer calls.
struct DeviceTable {
  explicit DeviceTable(VkDevice device, PFN_vkGetDeviceProcAddr get);

  PFN_vkGetDeviceProcAddr GetDeviceProcAddr;
  PFN_vkDestroyDevice DestroyDevice;
  PFN_vkGetDeviceQueue GetDeviceQueue;
  PFN_vkGetDeviceQueue2 GetDeviceQueue2;
  PFN_vkQueueSubmit QueueSubmit;
  PFN_vkQueueSubmit2 QueueSubmit2;
  PFN_vkQueueBindSparse QueueBindSparse;
  PFN_vkQueueWaitIdle QueueWaitIdle;
  PFN_vkDeviceWaitIdle DeviceWaitIdle;
  PFN_vkWaitSemaphores WaitSemaphores;
  PFN_vkGetSemaphoreCounterValue GetSemaphoreCounterValue;
  PFN_vkCreateFence CreateFence;
  PFN_vkDestroyFence DestroyFence;
  PFN_vkResetFences ResetFences;
  PFN_vkGetFenceStatus GetFenceStatus;
  PFN_vkWaitForFences WaitForFences;
  PFN_vkCreateQueryPool CreateQueryPool;
  PFN_vkDestroyQueryPool DestroyQueryPool;
  PFN_vkGetQueryPoolResults GetQueryPoolResults;
  PFN_vkAllocateMemory AllocateMemory;
  PFN_vkCreateCommandPool CreateCommandPool;
  PFN_vkDestroyCommandPool DestroyCommandPool;
  PFN_vkAllocateCommandBuffers AllocateCommandBuffers;
  PFN_vkBeginCommandBuffer BeginCommandBuffer;
  PFN_vkEndCommandBuffer EndCommandBuffer;
  PFN_vkCmdResetQueryPool CmdResetQueryPool;
  PFN_vkCmdPipelineBarrier CmdPipelineBarrier;
  PFN_vkCmdWriteTimestamp CmdWriteTimestamp;
};

/// What the physical device says of itself.
struct Clocks {
  double tick_ms = 0;                             // of a timestamp
  std::vector<VkQueueFamilyProperties> families;  // their queues' capabilities
};

class Device {
 public:
  Device(VkDevice device, PFN_vkGetDeviceProcAddr next, PFN_vkSetDeviceLoaderData set_loader_data,
         Clocks clocks, std::shared_ptr<const Settings> settings);
  /// Call it before the VkDevice is destroyed, when the application is done with it.
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceTable& below() const { return next_; }
  VkDevice handle() const { return device_; }
  /// Once true, it stays so.
  bool lost() const { return lost_; }
  /// VK_ERROR_DEVICE_LOST if it is, else what the next layer said.
  VkResult now(VkResult result) const { return lost_ ? VK_ERROR_DEVICE_LOST : result; }

  void found_queue(VkQueue queue, std::uint32_t family);
  VkResult submit(VkQueue queue, std::uint32_t count, const VkSubmitInfo* infos, VkFence fence);
  VkResult submit(VkQueue queue, std::uint32_t count, const VkSubmitInfo2* infos, VkFence fence);
  VkResult wait(const VkSemaphoreWaitInfo& info, std::uint64_t timeout);
  VkResult wait(std::uint32_t count, const VkFence* fences, VkBool32 all, std::uint64_t timeout);
  VkResult wait(VkQueue queue);
  VkResult wait();
  VkResult counter(VkSemaphore semaphore, std::uint64_t* value);
  VkResult status(VkFence fence);
  VkResult allocate(const VkMemoryAllocateInfo* info, const VkAllocationCallbacks* allocator,
                    VkDeviceMemory* memory) const;

 private:
  using Clock = std::chrono::steady_clock;

  /// Two timestamps, and the command buffers that write them before and after the application's.
  struct Stopwatch {
    VkQueryPool queries = VK_NULL_HANDLE;
    VkCommandBuffer begin = VK_NULL_HANDLE, end = VK_NULL_HANDLE;
  };
  struct Queue {
    const VkQueueFamilyProperties* family = nullptr;
    VkCommandPool pool = VK_NULL_HANDLE;  // null where the queue cannot write timestamps
    std::vector<Stopwatch> idle;
  };
  struct Signal {
    VkSemaphore semaphore;
    std::uint64_t value;
  };
  struct Submission {
    std::uint64_t index;  // in the process, from 1
    Stopwatch watch;
  };
  /// One call of vkQueueSubmit*, followed by a fence of the layer's own.
  struct Call {
    VkQueue queue;
    VkFence done;
    VkFence fence;                // the application's, or null
    std::vector<Signal> signals;  // of timeline semaphores
    std::vector<Submission> submissions;
    Clock::time_point begin;
  };

  template <class Info, class Submit>
  VkResult submit_any(VkQueue queue, std::uint32_t count, const Info* infos, VkFence fence,
                      Submit next);
  template <class Wait>
  VkResult wait_in_slices(std::uint64_t timeout, Wait wait) const;
  VkResult take_watch(Queue& queue, Stopwatch& watch);
  VkResult record(const Stopwatch& watch) const;
  VkResult take_fence(VkFence& fence);
  void give_back(Call& call);
  /// Judges all calls up to the last one of a queue that `covered` names. The application knows
  /// that these have ended.
  void settle(const std::function<bool(const Call&)>& covered);
  void settle_locked(const std::function<bool(const Call&)>& covered);
  void settle_signal(VkSemaphore semaphore, std::uint64_t value);
  void judge(Call& call);
  void say(const Submission& submission, double device_ms, double wall_ms, const char* end) const;

  const VkDevice device_;
  const DeviceTable next_;
  const PFN_vkSetDeviceLoaderData set_loader_data_;
  const Clocks clocks_;
  const std::shared_ptr<const Settings> settings_;
  const std::uint64_t ordinal_;  // in the process, from 1
  std::atomic<bool> lost_ = false;

  std::mutex mutex_;  // guards what follows
  std::unordered_map<VkQueue, Queue> queues_;
  std::vector<VkFence> idle_fences_;
  std::deque<Call> pending_;  // in the order of submission
};

}  // namespace keyfold::watchdog

// VK_LAYER_KEYFOLD_watchdog: behaves as an operating system that ends GPU jobs which run too long.
// What it is told is in settings.hpp; what it does with a submission, in device.hpp.
#include <vulkan/vk_layer.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "device.hpp"
#include "settings.hpp"

namespace keyfold::watchdog {
namespace {

template <class Function>
Function look_up(PFN_vkGetInstanceProcAddr get, VkInstance instance, const char* name) {
  return reinterpret_cast<Function>(get(instance, name));
}

/// Its functions are looked up at once: when the instance is complete, loaders up to 1.3.239 answer
/// with the topmost layer's instead of the next one's.
struct Instance {
  Instance(VkInstance instance, PFN_vkGetInstanceProcAddr get_next,
           std::shared_ptr<const Settings> told)
      : handle(instance),
        next(get_next),
        destroy(look_up<PFN_vkDestroyInstance>(get_next, instance, "vkDestroyInstance")),
        properties(look_up<PFN_vkGetPhysicalDeviceProperties>(get_next, instance,
                                                              "vkGetPhysicalDeviceProperties")),
        families(look_up<PFN_vkGetPhysicalDeviceQueueFamilyProperties>(
            get_next, instance, "vkGetPhysicalDeviceQueueFamilyProperties")),
        settings(std::move(told)) {}

  VkInstance handle;
  PFN_vkGetInstanceProcAddr next;
  PFN_vkDestroyInstance destroy;
  PFN_vkGetPhysicalDeviceProperties properties;
  PFN_vkGetPhysicalDeviceQueueFamilyProperties families;
  std::shared_ptr<const Settings> settings;
};

/// What stands at the beginning of each dispatchable object, the same for an instance and its
/// physical devices, and for a device and its queues.
void* key_of(const void* dispatchable) { return *static_cast<void* const*>(dispatchable); }

/// Objects by their key. Pointers stay valid until the object is taken out.
template <class Object>
class Registry {
 public:
  Object& at(const void* dispatchable) {
    const std::shared_lock lock(mutex_);
    return *objects_.at(key_of(dispatchable));
  }
  void put(const void* dispatchable, std::unique_ptr<Object> object) {
    const std::lock_guard lock(mutex_);
    objects_[key_of(dispatchable)] = std::move(object);
  }
  std::unique_ptr<Object> take(const void* dispatchable) {
    const std::lock_guard lock(mutex_);
    const auto found = objects_.find(key_of(dispatchable));
    std::unique_ptr<Object> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<void*, std::unique_ptr<Object>> objects_;
};

// Never destroyed: an application may leave devices to the end of the process.
Registry<Instance>& instances = *new Registry<Instance>;
Registry<Device>& devices = *new Registry<Device>;

/// The loader's structure for `function` in the chain of a create info, or null. The loader means
/// layers to write to it.
template <class Info>
Info* loader_info(const void* chain, VkStructureType type, VkLayerFunction function) {
  for (auto* at = static_cast<const VkBaseInStructure*>(chain); at != nullptr; at = at->pNext) {
    auto* info = reinterpret_cast<Info*>(const_cast<VkBaseInStructure*>(at));
    if (at->sType == type && info->function == function) return info;
  }
  return nullptr;
}

VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo* info,
                                               const VkAllocationCallbacks* allocator,
                                               VkInstance* instance) {
  auto* link = loader_info<VkLayerInstanceCreateInfo>(
      info->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO, VK_LAYER_LINK_INFO);
  if (link == nullptr) return VK_ERROR_INITIALIZATION_FAILED;
  const PFN_vkGetInstanceProcAddr next = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;
  std::shared_ptr<const Settings> settings;
  try {
    settings = std::make_shared<const Settings>(read_settings());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "VK_LAYER_KEYFOLD_watchdog: %s\n", e.what());
    return VK_ERROR_INITIALIZATION_FAILED;
  }
  const auto create = look_up<PFN_vkCreateInstance>(next, VK_NULL_HANDLE, "vkCreateInstance");
  const VkResult result = create(info, allocator, instance);
  if (result == VK_SUCCESS)
    instances.put(*instance, std::make_unique<Instance>(*instance, next, settings));
  return result;
}

VKAPI_ATTR void VKAPI_CALL destroy_instance(VkInstance instance,
                                            const VkAllocationCallbacks* allocator) {
  if (instance == VK_NULL_HANDLE) return;
  const std::unique_ptr<Instance> taken = instances.take(instance);
  taken->destroy(instance, allocator);
}

Clocks clocks_of(const Instance& instance, VkPhysicalDevice physical) {
  Clocks clocks;
  VkPhysicalDeviceProperties properties;
  instance.properties(physical, &properties);
  clocks.tick_ms = static_cast<double>(properties.limits.timestampPeriod) / 1e6;
  std::uint32_t count = 0;
  instance.families(physical, &count, nullptr);
  clocks.families.resize(count);
  instance.families(physical, &count, clocks.families.data());
  return clocks;
}

VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice physical,
                                             const VkDeviceCreateInfo* info,
                                             const VkAllocationCallbacks* allocator,
                                             VkDevice* device) {
  const auto find = [&](VkLayerFunction function) {
    return loader_info<VkLayerDeviceCreateInfo>(
        info->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO, function);
  };
  auto* link = find(VK_LAYER_LINK_INFO);
  const auto* data = find(VK_LOADER_DATA_CALLBACK);
  if (link == nullptr || data == nullptr) return VK_ERROR_INITIALIZATION_FAILED;
  const Instance& instance = instances.at(physical);
  const PFN_vkGetInstanceProcAddr next = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
  const PFN_vkGetDeviceProcAddr next_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
  link->u.pLayerInfo = link->u.pLayerInfo->pNext;
  const auto create = reinterpret_cast<PFN_vkCreateDevice>(next(instance.handle, "vkCreateDevice"));
  const VkResult result = create(physical, info, allocator, device);
  if (result == VK_SUCCESS)
    devices.put(*device,
                std::make_unique<Device>(*device, next_device, data->u.pfnSetDeviceLoaderData,
                                         clocks_of(instance, physical), instance.settings));
  return result;
}

VKAPI_ATTR void VKAPI_CALL destroy_device(VkDevice device, const VkAllocationCallbacks* allocator) {
  if (device == VK_NULL_HANDLE) return;
  std::unique_ptr<Device> taken = devices.take(device);
  const PFN_vkDestroyDevice destroy = taken->below().DestroyDevice;
  taken.reset();
  destroy(device, allocator);
}

VKAPI_ATTR void VKAPI_CALL get_device_queue(VkDevice device, std::uint32_t family,
                                            std::uint32_t index, VkQueue* queue) {
  Device& watched = devices.at(device);
  watched.below().GetDeviceQueue(device, family, index, queue);
  watched.found_queue(*queue, family);
}

VKAPI_ATTR void VKAPI_CALL get_device_queue2(VkDevice device, const VkDeviceQueueInfo2* info,
                                             VkQueue* queue) {
  Device& watched = devices.at(device);
  watched.below().GetDeviceQueue2(device, info, queue);
  if (*queue != VK_NULL_HANDLE) watched.found_queue(*queue, info->queueFamilyIndex);
}

VKAPI_ATTR VkResult VKAPI_CALL queue_submit(VkQueue queue, std::uint32_t count,
                                            const VkSubmitInfo* infos, VkFence fence) {
  return devices.at(queue).submit(queue, count, infos, fence);
}

VKAPI_ATTR VkResult VKAPI_CALL queue_submit2(VkQueue queue, std::uint32_t count,
                                             const VkSubmitInfo2* infos, VkFence fence) {
  return devices.at(queue).submit(queue, count, infos, fence);
}

VKAPI_ATTR VkResult VKAPI_CALL queue_bind_sparse(VkQueue queue, std::uint32_t count,
                                                 const VkBindSparseInfo* infos, VkFence fence) {
  Device& watched = devices.at(queue);
  if (watched.lost()) return VK_ERROR_DEVICE_LOST;
  return watched.below().QueueBindSparse(queue, count, infos, fence);
}

VKAPI_ATTR VkResult VKAPI_CALL queue_wait_idle(VkQueue queue) {
  return devices.at(queue).wait(queue);
}

VKAPI_ATTR VkResult VKAPI_CALL device_wait_idle(VkDevice device) {
  return devices.at(device).wait();
}

VKAPI_ATTR VkResult VKAPI_CALL wait_semaphores(VkDevice device, const VkSemaphoreWaitInfo* info,
                                               std::uint64_t timeout) {
  return devices.at(device).wait(*info, timeout);
}

VKAPI_ATTR VkResult VKAPI_CALL get_semaphore_counter_value(VkDevice device, VkSemaphore semaphore,
                                                           std::uint64_t* value) {
  return devices.at(device).counter(semaphore, value);
}

VKAPI_ATTR VkResult VKAPI_CALL wait_for_fences(VkDevice device, std::uint32_t count,
                                               const VkFence* fences, VkBool32 all,
                                               std::uint64_t timeout) {
  return devices.at(device).wait(count, fences, all, timeout);
}

VKAPI_ATTR VkResult VKAPI_CALL get_fence_status(VkDevice device, VkFence fence) {
  return devices.at(device).status(fence);
}

VKAPI_ATTR VkResult VKAPI_CALL get_query_pool_results(VkDevice device, VkQueryPool pool,
                                                      std::uint32_t first, std::uint32_t count,
                                                      std::size_t size, void* data,
                                                      VkDeviceSize stride,
                                                      VkQueryResultFlags flags) {
  Device& watched = devices.at(device);
  if (watched.lost()) return VK_ERROR_DEVICE_LOST;
  return watched.below().GetQueryPoolResults(device, pool, first, count, size, data, stride, flags);
}

VKAPI_ATTR VkResult VKAPI_CALL allocate_memory(VkDevice device, const VkMemoryAllocateInfo* info,
                                               const VkAllocationCallbacks* allocator,
                                               VkDeviceMemory* memory) {
  return devices.at(device).allocate(info, allocator, memory);
}

using Functions = std::unordered_map<std::string_view, PFN_vkVoidFunction>;

template <class Function>
PFN_vkVoidFunction plain(Function* function) {
  return reinterpret_cast<PFN_vkVoidFunction>(function);
}

PFN_vkVoidFunction find(const Functions& functions, const char* name) {
  const auto found = functions.find(name);
  return found != functions.end() ? found->second : nullptr;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_device_proc_addr(VkDevice device, const char* name);

PFN_vkVoidFunction device_function(const char* name) {
  static const Functions& functions = *new Functions{
      {"vkGetDeviceProcAddr", plain(get_device_proc_addr)},
      {"vkDestroyDevice", plain(destroy_device)},
      {"vkGetDeviceQueue", plain(get_device_queue)},
      {"vkGetDeviceQueue2", plain(get_device_queue2)},
      {"vkQueueSubmit", plain(queue_submit)},
      {"vkQueueSubmit2", plain(queue_submit2)},
      {"vkQueueSubmit2KHR", plain(queue_submit2)},
      {"vkQueueBindSparse", plain(queue_bind_sparse)},
      {"vkQueueWaitIdle", plain(queue_wait_idle)},
      {"vkDeviceWaitIdle", plain(device_wait_idle)},
      {"vkWaitSemaphores", plain(wait_semaphores)},
      {"vkWaitSemaphoresKHR", plain(wait_semaphores)},
      {"vkGetSemaphoreCounterValue", plain(get_semaphore_counter_value)},
      {"vkGetSemaphoreCounterValueKHR", plain(get_semaphore_counter_value)},
      {"vkWaitForFences", plain(wait_for_fences)},
      {"vkGetFenceStatus", plain(get_fence_status)},
      {"vkGetQueryPoolResults", plain(get_query_pool_results)},
      {"vkAllocateMemory", plain(allocate_memory)},
  };
  return find(functions, name);
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_device_proc_addr(VkDevice device, const char* name) {
  // What the device does not have, the layer does not add.
  const PFN_vkVoidFunction next = devices.at(device).below().GetDeviceProcAddr(device, name);
  const PFN_vkVoidFunction own = device_function(name);
  return next != nullptr && own != nullptr ? own : next;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL get_instance_proc_addr(VkInstance instance,
                                                                const char* name) {
  static const Functions& functions = *new Functions{
      {"vkGetInstanceProcAddr", plain(get_instance_proc_addr)},
      {"vkCreateInstance", plain(create_instance)},
      {"vkDestroyInstance", plain(destroy_instance)},
      {"vkCreateDevice", plain(create_device)},
  };
  if (const PFN_vkVoidFunction own = find(functions, name)) return own;
  if (const PFN_vkVoidFunction own = device_function(name)) return own;
  return instance != VK_NULL_HANDLE ? instances.at(instance).next(instance, name) : nullptr;
}

}  // namespace
}  // namespace keyfold::watchdog

extern "C" VK_LAYER_EXPORT VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface* version) {
  if (version->loaderLayerInterfaceVersion < 2) return VK_ERROR_INITIALIZATION_FAILED;
  version->loaderLayerInterfaceVersion = 2;
  version->pfnGetInstanceProcAddr = keyfold::watchdog::get_instance_proc_addr;
  version->pfnGetDeviceProcAddr = keyfold::watchdog::get_device_proc_addr;
  version->pfnGetPhysicalDeviceProcAddr = nullptr;
  return VK_SUCCESS;
}

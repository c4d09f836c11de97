// Timing, judging, and being lost.
#include "device.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <unordered_set>
#include <utility>

namespace keyfold::watchdog {
namespace {

std::atomic<std::uint64_t> devices_made = 0;
std::atomic<std::uint64_t> submissions_made = 0;

constexpr std::uint64_t kSliceNs = 20'000'000;      // a wait looks this often whether all is lost
constexpr std::uint64_t kDrainNs = 10'000'000'000;  // what is in flight at a loss may take it
constexpr std::size_t kMaxUnseen = 64;              // calls that no wait has covered

template <class Function>
void load(Function& function, VkDevice device, PFN_vkGetDeviceProcAddr get, const char* name,
          const char* older_name = nullptr) {
  function = reinterpret_cast<Function>(get(device, name));
  if (function == nullptr && older_name != nullptr) load(function, device, get, older_name);
}

/// The structure of this type in a chain, or null.
template <class Struct>
const Struct* find(const void* chain, VkStructureType type) {
  for (auto* at = static_cast<const VkBaseInStructure*>(chain); at != nullptr; at = at->pNext)
    if (at->sType == type) return reinterpret_cast<const Struct*>(at);
  return nullptr;
}

std::uint32_t num_commands(const VkSubmitInfo& info) { return info.commandBufferCount; }
std::uint32_t num_commands(const VkSubmitInfo2& info) { return info.commandBufferInfoCount; }

/// A batch with a stopwatch around its command buffers. What it waits for holds back all stages, so
/// that the stopwatch does not run meanwhile.
template <class Info>
struct Framed;

template <>
struct Framed<VkSubmitInfo> {
  Framed(const VkSubmitInfo& batch, VkCommandBuffer begin, VkCommandBuffer end)
      : commands(batch.pCommandBuffers, batch.pCommandBuffers + batch.commandBufferCount),
        stages(batch.waitSemaphoreCount, VK_PIPELINE_STAGE_ALL_COMMANDS_BIT),
        info(batch) {
    commands.insert(commands.begin(), begin);
    commands.push_back(end);
    info.commandBufferCount = static_cast<std::uint32_t>(commands.size());
    info.pCommandBuffers = commands.data();
    info.pWaitDstStageMask = stages.data();
  }
  std::vector<VkCommandBuffer> commands;
  std::vector<VkPipelineStageFlags> stages;
  VkSubmitInfo info;
};

template <>
struct Framed<VkSubmitInfo2> {
  Framed(const VkSubmitInfo2& batch, VkCommandBuffer begin, VkCommandBuffer end)
      : commands(batch.pCommandBufferInfos,
                 batch.pCommandBufferInfos + batch.commandBufferInfoCount),
        waits(batch.pWaitSemaphoreInfos, batch.pWaitSemaphoreInfos + batch.waitSemaphoreInfoCount),
        info(batch) {
    VkCommandBufferSubmitInfo own{VK_STRUCTURE_TYPE_COMMAND_BUFFER_SUBMIT_INFO, nullptr, begin, 0};
    commands.insert(commands.begin(), own);
    own.commandBuffer = end;
    commands.push_back(own);
    for (VkSemaphoreSubmitInfo& wait : waits) wait.stageMask = VK_PIPELINE_STAGE_2_ALL_COMMANDS_BIT;
    info.commandBufferInfoCount = static_cast<std::uint32_t>(commands.size());
    info.pCommandBufferInfos = commands.data();
    info.pWaitSemaphoreInfos = waits.data();
  }
  std::vector<VkCommandBufferSubmitInfo> commands;
  std::vector<VkSemaphoreSubmitInfo> waits;
  VkSubmitInfo2 info;
};

template <class Add>
void each_signal(const VkSubmitInfo& info, Add add) {
  const auto* values = find<VkTimelineSemaphoreSubmitInfo>(
      info.pNext, VK_STRUCTURE_TYPE_TIMELINE_SEMAPHORE_SUBMIT_INFO);
  for (std::uint32_t i = 0; values != nullptr && i < values->signalSemaphoreValueCount; ++i)
    add(info.pSignalSemaphores[i], values->pSignalSemaphoreValues[i]);
}

template <class Add>
void each_signal(const VkSubmitInfo2& info, Add add) {
  for (std::uint32_t i = 0; i < info.signalSemaphoreInfoCount; ++i)
    add(info.pSignalSemaphoreInfos[i].semaphore, info.pSignalSemaphoreInfos[i].value);
}

}  // namespace

DeviceTable::DeviceTable(VkDevice device, PFN_vkGetDeviceProcAddr get) : GetDeviceProcAddr(get) {
  load(DestroyDevice, device, get, "vkDestroyDevice");
  load(GetDeviceQueue, device, get, "vkGetDeviceQueue");
  load(GetDeviceQueue2, device, get, "vkGetDeviceQueue2");
  load(QueueSubmit, device, get, "vkQueueSubmit");
  load(QueueSubmit2, device, get, "vkQueueSubmit2", "vkQueueSubmit2KHR");
  load(QueueBindSparse, device, get, "vkQueueBindSparse");
  load(QueueWaitIdle, device, get, "vkQueueWaitIdle");
  load(DeviceWaitIdle, device, get, "vkDeviceWaitIdle");
  load(WaitSemaphores, device, get, "vkWaitSemaphores", "vkWaitSemaphoresKHR");
  load(GetSemaphoreCounterValue, device, get, "vkGetSemaphoreCounterValue",
       "vkGetSemaphoreCounterValueKHR");
  load(CreateFence, device, get, "vkCreateFence");
  load(DestroyFence, device, get, "vkDestroyFence");
  load(ResetFences, device, get, "vkResetFences");
  load(GetFenceStatus, device, get, "vkGetFenceStatus");
  load(WaitForFences, device, get, "vkWaitForFences");
  load(CreateQueryPool, device, get, "vkCreateQueryPool");
  load(DestroyQueryPool, device, get, "vkDestroyQueryPool");
  load(GetQueryPoolResults, device, get, "vkGetQueryPoolResults");
  load(AllocateMemory, device, get, "vkAllocateMemory");
  load(CreateCommandPool, device, get, "vkCreateCommandPool");
  load(DestroyCommandPool, device, get, "vkDestroyCommandPool");
  load(AllocateCommandBuffers, device, get, "vkAllocateCommandBuffers");
  load(BeginCommandBuffer, device, get, "vkBeginCommandBuffer");
  load(EndCommandBuffer, device, get, "vkEndCommandBuffer");
  load(CmdResetQueryPool, device, get, "vkCmdResetQueryPool");
  load(CmdPipelineBarrier, device, get, "vkCmdPipelineBarrier");
  load(CmdWriteTimestamp, device, get, "vkCmdWriteTimestamp");
}

Device::Device(VkDevice device, PFN_vkGetDeviceProcAddr next,
               PFN_vkSetDeviceLoaderData set_loader_data, Clocks clocks,
               std::shared_ptr<const Settings> settings)
    : device_(device),
      next_(device, next),
      set_loader_data_(set_loader_data),
      clocks_(std::move(clocks)),
      settings_(std::move(settings)),
      ordinal_(++devices_made) {}

Device::~Device() {
  settle([](const Call&) { return true; });
  for (auto& [handle, queue] : queues_) {
    for (const Stopwatch& watch : queue.idle)
      next_.DestroyQueryPool(device_, watch.queries, nullptr);
    if (queue.pool != VK_NULL_HANDLE) next_.DestroyCommandPool(device_, queue.pool, nullptr);
  }
  for (const VkFence fence : idle_fences_) next_.DestroyFence(device_, fence, nullptr);
}

void Device::found_queue(VkQueue handle, std::uint32_t family) {
  const std::lock_guard lock(mutex_);
  const auto [at, is_new] = queues_.try_emplace(handle);
  if (!is_new) return;
  Queue& queue = at->second;
  queue.family = &clocks_.families.at(family);
  if (queue.family->timestampValidBits == 0) return;
  if ((queue.family->queueFlags & (VK_QUEUE_GRAPHICS_BIT | VK_QUEUE_COMPUTE_BIT)) == 0) return;
  const VkCommandPoolCreateInfo info{VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO, nullptr, 0,
                                     family};
  if (next_.CreateCommandPool(device_, &info, nullptr, &queue.pool) != VK_SUCCESS)
    queue.pool = VK_NULL_HANDLE;
}

VkResult Device::take_watch(Queue& queue, Stopwatch& watch) {
  if (queue.pool == VK_NULL_HANDLE) return VK_SUCCESS;
  if (!queue.idle.empty()) {
    watch = queue.idle.back();
    queue.idle.pop_back();
    return VK_SUCCESS;
  }
  VkQueryPoolCreateInfo queries{};
  queries.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO;
  queries.queryType = VK_QUERY_TYPE_TIMESTAMP;
  queries.queryCount = 2;
  const VkCommandBufferAllocateInfo commands{VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO,
                                             nullptr, queue.pool, VK_COMMAND_BUFFER_LEVEL_PRIMARY,
                                             2};
  VkResult result = next_.CreateQueryPool(device_, &queries, nullptr, &watch.queries);
  if (result != VK_SUCCESS) return result;
  VkCommandBuffer made[2];
  result = next_.AllocateCommandBuffers(device_, &commands, made);
  if (result == VK_SUCCESS) {
    // The loader has not seen these handles, and the layers below look for its mark in them.
    set_loader_data_(device_, made[0]);
    set_loader_data_(device_, made[1]);
    watch.begin = made[0];
    watch.end = made[1];
    result = record(watch);
  }
  if (result != VK_SUCCESS) {
    next_.DestroyQueryPool(device_, watch.queries, nullptr);
    watch = {};
  }
  return result;
}

VkResult Device::record(const Stopwatch& watch) const {
  const auto barrier = [&](VkCommandBuffer commands) {
    next_.CmdPipelineBarrier(commands, VK_PIPELINE_STAGE_ALL_COMMANDS_BIT,
                             VK_PIPELINE_STAGE_ALL_COMMANDS_BIT, 0, 0, nullptr, 0, nullptr, 0,
                             nullptr);
  };
  VkCommandBufferBeginInfo info{};
  info.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO;
  VkResult result = next_.BeginCommandBuffer(watch.begin, &info);
  if (result != VK_SUCCESS) return result;
  // What was submitted before is over when the stopwatch starts.
  barrier(watch.begin);
  next_.CmdResetQueryPool(watch.begin, watch.queries, 0, 2);
  next_.CmdWriteTimestamp(watch.begin, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, watch.queries, 0);
  barrier(watch.begin);
  if ((result = next_.EndCommandBuffer(watch.begin)) != VK_SUCCESS) return result;
  if ((result = next_.BeginCommandBuffer(watch.end, &info)) != VK_SUCCESS) return result;
  barrier(watch.end);
  next_.CmdWriteTimestamp(watch.end, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, watch.queries, 1);
  return next_.EndCommandBuffer(watch.end);
}

VkResult Device::take_fence(VkFence& fence) {
  if (!idle_fences_.empty()) {
    fence = idle_fences_.back();
    idle_fences_.pop_back();
    return next_.ResetFences(device_, 1, &fence);
  }
  const VkFenceCreateInfo info{VK_STRUCTURE_TYPE_FENCE_CREATE_INFO, nullptr, 0};
  return next_.CreateFence(device_, &info, nullptr, &fence);
}

void Device::give_back(Call& call) {
  for (const Submission& submission : call.submissions)
    if (submission.watch.queries != VK_NULL_HANDLE)
      queues_[call.queue].idle.push_back(submission.watch);
  if (call.done != VK_NULL_HANDLE) idle_fences_.push_back(call.done);
}

template <class Info, class Submit>
VkResult Device::submit_any(VkQueue queue, std::uint32_t count, const Info* infos, VkFence fence,
                            Submit next) {
  // Held through the submission: a wait that sees the end of it must find it in the list.
  const std::lock_guard lock(mutex_);
  // What an application never waits for is judged here.
  if (pending_.size() >= kMaxUnseen)
    settle_locked(
        [&](const Call& call) { return next_.GetFenceStatus(device_, call.done) == VK_SUCCESS; });
  if (lost_) return VK_ERROR_DEVICE_LOST;
  Call call{queue, VK_NULL_HANDLE, fence, {}, {}, Clock::now()};
  const std::vector<Info> batches(infos, infos + count);
  for (const Info& batch : batches) {
    if (num_commands(batch) == 0) continue;
    call.submissions.push_back({++submissions_made, {}});
    if (settings_->oom_at != call.submissions.back().index) continue;
    say(call.submissions.back(), 0, 0, "REFUSED");
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  }
  VkResult result = take_fence(call.done);
  for (Submission& submission : call.submissions)
    if (result == VK_SUCCESS) result = take_watch(queues_[queue], submission.watch);

  std::deque<Framed<Info>> frames;  // its elements never move
  std::vector<Info> all;
  auto submission = call.submissions.begin();
  for (const Info& batch : batches) {
    each_signal(batch, [&](VkSemaphore semaphore, std::uint64_t value) {
      call.signals.push_back({semaphore, value});
    });
    const bool timed = num_commands(batch) > 0 && submission->watch.queries != VK_NULL_HANDLE;
    all.push_back(
        timed ? frames.emplace_back(batch, submission->watch.begin, submission->watch.end).info
              : batch);
    if (num_commands(batch) > 0) ++submission;
  }
  if (result == VK_SUCCESS) result = next(queue, count, all.data(), fence);
  if (result == VK_SUCCESS) {
    result = next_.QueueSubmit(queue, 0, nullptr, call.done);
    pending_.push_back(std::move(call));
  } else {
    give_back(call);
  }
  if (result == VK_ERROR_DEVICE_LOST) lost_ = true;
  return result;
}

VkResult Device::submit(VkQueue queue, std::uint32_t count, const VkSubmitInfo* infos,
                        VkFence fence) {
  return submit_any(queue, count, infos, fence, next_.QueueSubmit);
}

VkResult Device::submit(VkQueue queue, std::uint32_t count, const VkSubmitInfo2* infos,
                        VkFence fence) {
  return submit_any(queue, count, infos, fence, next_.QueueSubmit2);
}

template <class Wait>
VkResult Device::wait_in_slices(std::uint64_t timeout, Wait wait) const {
  for (;; timeout -= kSliceNs) {
    if (lost_) return VK_ERROR_DEVICE_LOST;
    const VkResult result = wait(std::min(timeout, kSliceNs));
    if (result != VK_TIMEOUT || timeout <= kSliceNs) return result;
  }
}

VkResult Device::wait(const VkSemaphoreWaitInfo& info, std::uint64_t timeout) {
  const VkResult result = wait_in_slices(
      timeout, [&](std::uint64_t slice) { return next_.WaitSemaphores(device_, &info, slice); });
  for (std::uint32_t i = 0; result == VK_SUCCESS && i < info.semaphoreCount; ++i) {
    std::uint64_t value = 0;
    if (next_.GetSemaphoreCounterValue(device_, info.pSemaphores[i], &value) == VK_SUCCESS)
      settle_signal(info.pSemaphores[i], std::min(value, info.pValues[i]));
  }
  return now(result);
}

VkResult Device::wait(std::uint32_t count, const VkFence* fences, VkBool32 all,
                      std::uint64_t timeout) {
  const VkResult result = wait_in_slices(timeout, [&](std::uint64_t slice) {
    return next_.WaitForFences(device_, count, fences, all, slice);
  });
  for (std::uint32_t i = 0; result == VK_SUCCESS && i < count; ++i) status(fences[i]);
  return now(result);
}

VkResult Device::wait(VkQueue queue) {
  if (lost_) return VK_ERROR_DEVICE_LOST;
  const VkResult result = next_.QueueWaitIdle(queue);
  if (result == VK_SUCCESS) settle([&](const Call& call) { return call.queue == queue; });
  return now(result);
}

VkResult Device::wait() {
  if (lost_) return VK_ERROR_DEVICE_LOST;
  const VkResult result = next_.DeviceWaitIdle(device_);
  if (result == VK_SUCCESS) settle([](const Call&) { return true; });
  return now(result);
}

VkResult Device::counter(VkSemaphore semaphore, std::uint64_t* value) {
  if (lost_) return VK_ERROR_DEVICE_LOST;
  const VkResult result = next_.GetSemaphoreCounterValue(device_, semaphore, value);
  if (result == VK_SUCCESS) settle_signal(semaphore, *value);
  return now(result);
}

VkResult Device::status(VkFence fence) {
  if (lost_) return VK_ERROR_DEVICE_LOST;
  const VkResult result = next_.GetFenceStatus(device_, fence);
  if (result == VK_SUCCESS) settle([&](const Call& call) { return call.fence == fence; });
  return now(result);
}

VkResult Device::allocate(const VkMemoryAllocateInfo* info, const VkAllocationCallbacks* allocator,
                          VkDeviceMemory* memory) const {
  if (settings_->no_memory_over && info->allocationSize > *settings_->no_memory_over)
    return VK_ERROR_OUT_OF_DEVICE_MEMORY;
  return next_.AllocateMemory(device_, info, allocator, memory);
}

void Device::settle_signal(VkSemaphore semaphore, std::uint64_t value) {
  settle([&](const Call& call) {
    return std::any_of(call.signals.begin(), call.signals.end(), [&](const Signal& signal) {
      return signal.semaphore == semaphore && signal.value <= value;
    });
  });
}

void Device::settle(const std::function<bool(const Call&)>& covered) {
  const std::lock_guard lock(mutex_);
  settle_locked(covered);
}

void Device::settle_locked(const std::function<bool(const Call&)>& covered) {
  std::unordered_set<VkQueue> ended;
  std::deque<Call> judged, left;
  for (auto call = pending_.rbegin(); call != pending_.rend(); ++call) {
    if (covered(*call)) ended.insert(call->queue);
    (ended.contains(call->queue) ? judged : left).push_front(std::move(*call));
  }
  pending_ = std::move(left);
  const bool was_lost = lost_;
  for (Call& call : judged) judge(call);
  if (lost_ == was_lost) return;
  // The application may now free all that the device still reads, so let that end.
  for (Call& call : pending_) judge(call);
  pending_.clear();
}

void Device::judge(Call& call) {
  const bool ended = next_.WaitForFences(device_, 1, &call.done, VK_TRUE, kDrainNs) == VK_SUCCESS;
  const double wall_ms =
      std::chrono::duration<double, std::milli>(Clock::now() - call.begin).count();
  if (!ended) return;  // its parts are still in use: they stay as they are until the device goes
  const std::uint32_t bits = queues_[call.queue].family->timestampValidBits;
  const std::uint64_t wrap = bits < 64 ? (std::uint64_t{1} << bits) - 1 : UINT64_MAX;
  for (const Submission& submission : call.submissions) {
    double device_ms = wall_ms;  // at most; for queues without timestamps
    std::uint64_t ticks[2];
    if (submission.watch.queries != VK_NULL_HANDLE &&
        next_.GetQueryPoolResults(device_, submission.watch.queries, 0, 2, sizeof(ticks), ticks,
                                  sizeof(ticks[0]), VK_QUERY_RESULT_64_BIT) == VK_SUCCESS)
      device_ms = static_cast<double>((ticks[1] - ticks[0]) & wrap) * clocks_.tick_ms;
    const auto& lose_at = settings_->lose_at;
    const bool too_long = settings_->limit_ms && device_ms > *settings_->limit_ms;
    const bool chosen =
        std::find(lose_at.begin(), lose_at.end(), submission.index) != lose_at.end();
    const bool kills = !lost_ && (too_long || chosen);
    say(submission, device_ms, wall_ms, kills ? "LOST" : lost_ ? "DROPPED" : "");
    if (kills) lost_ = true;
  }
  give_back(call);
}

void Device::say(const Submission& submission, double device_ms, double wall_ms,
                 const char* end) const {
  char text[160];
  std::snprintf(text, sizeof(text),
                "process %d device %llu submission %llu device_ms %.3f wall_ms %.3f%s%s",
                static_cast<int>(getpid()), static_cast<unsigned long long>(ordinal_),
                static_cast<unsigned long long>(submission.index), device_ms, wall_ms,
                *end != '\0' ? " " : "", end);
  settings_->log.line(text);
}

}  // namespace keyfold::watchdog

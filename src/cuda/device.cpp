// Making what a device works with.
#include "cuda/device.hpp"

#include <utility>

namespace keyfold::cuda {
namespace {

constexpr cuuint64_t kMostIdle = 512 << 20;  // bytes that the pool keeps from call to call

CUcontext primary_context(const Driver& driver, CUdevice device) {
  CUcontext context = nullptr;
  driver.device_primary_ctx_retain(&context, device);
  return context;
}

}  // namespace

StreamParts::StreamParts(const Driver& d, CUcontext c) : driver(d), context(c) {
  const Scope scope(driver, context);
  try {
    // Beside whatever the rest of the process does on its own streams.
    driver.stream_create(&kernels, CU_STREAM_NON_BLOCKING);
    driver.stream_create(&copies, CU_STREAM_NON_BLOCKING);
    for (Slot& slot : slots) {
      driver.event_create(&slot.copied, CU_EVENT_DISABLE_TIMING);
      driver.event_create(&slot.begin, CU_EVENT_DEFAULT);
      driver.event_create(&slot.end, CU_EVENT_DEFAULT);
    }
  } catch (...) {
    destroy();
    throw;
  }
}

StreamParts::~StreamParts() {
  if (driver.ctx_push_current.quietly(context) != CUDA_SUCCESS) return;
  destroy();
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
}

void StreamParts::destroy() noexcept {
  for (const Slot& slot : slots)
    for (CUevent event : {slot.copied, slot.begin, slot.end})
      if (event != nullptr) driver.event_destroy.quietly(event);
  for (CUstream stream : {kernels, copies})
    if (stream != nullptr) driver.stream_destroy.quietly(stream);
}

Device::Device(const Driver& driver, CUdevice device, const Traits& traits, const Nvrtc& nvrtc)
    : driver_(driver),
      handle_(device),
      context_(primary_context(driver, device)),
      buffers_(driver, context_),
      modules_(driver, context_, nvrtc, traits.capability) {}

CUmemoryPool Device::stream_pool() {
  const std::lock_guard lock(mutex_);
  if (stream_pool_ != nullptr) return stream_pool_;
  CUmemPoolProps properties{};
  properties.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, handle_};
  driver_.mem_pool_create(&stream_pool_, &properties);
  cuuint64_t kept = kMostIdle;
  driver_.mem_pool_set_attribute(stream_pool_, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                                 static_cast<void*>(&kept));
  return stream_pool_;
}

std::unique_ptr<StreamParts> Device::take_stream() {
  if (auto found = idle_streams_.take()) return found;
  return std::make_unique<StreamParts>(driver_, context_);
}

}  // namespace keyfold::cuda

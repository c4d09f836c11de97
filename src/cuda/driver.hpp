// The CUDA driver, opened at run time: the functions that keyfold uses, each of them checked.
#pragma once

#include <cuda.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

namespace keyfold::cuda {

/// A call of the driver that failed.
class Failure : public std::runtime_error {
 public:
  Failure(const char* function, CUresult code);

  CUresult code() const { return code_; }
  bool out_of_memory() const { return code_ == CUDA_ERROR_OUT_OF_MEMORY; }
  /// Whether the device can't be used again in this process: CUDA gives the same error for all that
  /// follows, and says that only a new process helps.
  bool fatal() const;

 private:
  CUresult code_;
};

/// A function of the driver. Calling it throws Failure for every result but success.
template <class Function>
class Entry {
 public:
  template <class... Arguments>
  void operator()(Arguments... arguments) const {
    const CUresult result = function_(arguments...);
    if (result != CUDA_SUCCESS) throw Failure(name_, result);
  }
  /// For destructors, where no error can be told.
  template <class... Arguments>
  CUresult quietly(Arguments... arguments) const noexcept {
    return function_(arguments...);
  }

 private:
  friend class Driver;
  const char* name_ = nullptr;
  Function function_ = nullptr;
};

// Name here, name in cuda.h, which a macro there may turn into a later version of it.
// What tells the devices, of drivers of any age.
#define KEYFOLD_CUDA_BASICS(X)              \
  X(get_error_name, cuGetErrorName)         \
  X(get_error_string, cuGetErrorString)     \
  X(init, cuInit)                           \
  X(driver_get_version, cuDriverGetVersion) \
  X(device_get_count, cuDeviceGetCount)     \
  X(device_get, cuDeviceGet)                \
  X(device_get_name, cuDeviceGetName)       \
  X(device_get_attribute, cuDeviceGetAttribute)
#define KEYFOLD_CUDA_FUNCTIONS(X)                        \
  X(device_total_mem, cuDeviceTotalMem)                  \
  X(device_primary_ctx_retain, cuDevicePrimaryCtxRetain) \
  X(ctx_push_current, cuCtxPushCurrent)                  \
  X(ctx_pop_current, cuCtxPopCurrent)                    \
  X(mem_alloc, cuMemAlloc)                               \
  X(mem_free, cuMemFree)                                 \
  X(mem_host_alloc, cuMemHostAlloc)                      \
  X(mem_pool_create, cuMemPoolCreate)                    \
  X(mem_pool_set_attribute, cuMemPoolSetAttribute)       \
  X(mem_alloc_from_pool_async, cuMemAllocFromPoolAsync)  \
  X(mem_free_async, cuMemFreeAsync)                      \
  X(pointer_get_attribute, cuPointerGetAttribute)        \
  X(mem_free_host, cuMemFreeHost)                        \
  X(memcpy_htod_async, cuMemcpyHtoDAsync)                \
  X(memcpy_dtoh_async, cuMemcpyDtoHAsync)                \
  X(memset_d8_async, cuMemsetD8Async)                    \
  X(stream_create, cuStreamCreate)                       \
  X(stream_destroy, cuStreamDestroy)                     \
  X(stream_query, cuStreamQuery)                         \
  X(stream_get_ctx, cuStreamGetCtx)                      \
  X(stream_is_capturing, cuStreamIsCapturing)            \
  X(stream_synchronize, cuStreamSynchronize)             \
  X(stream_wait_event, cuStreamWaitEvent)                \
  X(event_create, cuEventCreate)                         \
  X(event_destroy, cuEventDestroy)                       \
  X(event_record, cuEventRecord)                         \
  X(event_synchronize, cuEventSynchronize)               \
  X(event_elapsed_time, cuEventElapsedTime)              \
  X(module_load_data, cuModuleLoadData)                  \
  X(module_unload, cuModuleUnload)                       \
  X(module_get_function, cuModuleGetFunction)            \
  X(func_set_attribute, cuFuncSetAttribute)              \
  X(launch_kernel_ex, cuLaunchKernelEx)                  \
  X(tensor_map_encode_tiled, cuTensorMapEncodeTiled)

class Driver {
 public:
  /// The machine's driver, opened at the first call; null where there is none, or no device.
  static const Driver* get();

  /// Of CUDA, as 1000 * major + 10 * minor.
  int version() const { return version_; }
  int device_count() const { return device_count_; }
  /// `overlaps`, `clusters`: see KernelSpec; of devices of compute capability 9.0 and later.
  void launch(CUfunction function, const std::array<unsigned, 3>& grid, unsigned threads,
              unsigned shared_bytes, CUstream stream, void** arguments, bool overlaps = false,
              bool clusters = false) const;
  /// Why the driver can't run kernels; empty if it can.
  const std::string& missing() const { return missing_; }

#define X(name, function) Entry<decltype(&::function)> name;  // NOLINT(bugprone-macro-parentheses)
  KEYFOLD_CUDA_BASICS(X)
  KEYFOLD_CUDA_FUNCTIONS(X)
#undef X

 private:
  static constexpr int kOldest = 12000;

  bool open();
  /// Returns whether the function was found.
  template <class Function>
  static bool set(Entry<Function>& entry, const char* name, void* function) {
    entry.name_ = name;
    entry.function_ = reinterpret_cast<Function>(function);
    return function != nullptr;
  }

  int version_ = 0, device_count_ = 0;
  std::string missing_;
};

/// A context that is current in this thread for a while; the caller's own is so again afterwards.
class Scope {
 public:
  Scope(const Driver& driver, CUcontext context) : driver_(driver) {
    driver_.ctx_push_current(context);
  }
  ~Scope() {
    CUcontext ignored = nullptr;
    driver_.ctx_pop_current.quietly(&ignored);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  const Driver& driver_;
};

/// "13.0"
std::string version_text(int version);

}  // namespace keyfold::cuda

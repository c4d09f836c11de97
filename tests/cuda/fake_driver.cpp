// A driver of two GPUs that computes nothing: memory is the host's, kernels are counted, and what
// is to fail is told by environment variables.
#include <cuda.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/driver.hpp"

namespace {

long setting(const char* name, long otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atol(value) : otherwise;
}

std::atomic<long> launches{0}, memory{0};
std::atomic<CUresult> fault{CUDA_SUCCESS};     // once there, there for all that follows
thread_local std::vector<CUcontext> contexts;  // the current one last

/// As the real one: everything needs a context, and nothing works after a fault.
CUresult state() {
  if (fault != CUDA_SUCCESS) return fault;
  return contexts.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

template <class Handle>
CUresult make(Handle* handle) {
  if (const CUresult now = state(); now != CUDA_SUCCESS) return now;
  *handle = reinterpret_cast<Handle>(new char);
  return CUDA_SUCCESS;
}
template <class Handle>
CUresult destroy(Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return state();
}

/// Each block tells its size, for the limit.
CUresult allocate(void** block, std::size_t bytes) {
  if (const CUresult now = state(); now != CUDA_SUCCESS) return now;
  const auto size = static_cast<long>(bytes);
  if (memory + size > setting("KEYFOLD_FAKE_MEMORY", 1L << 40)) return CUDA_ERROR_OUT_OF_MEMORY;
  memory += size;
  auto* const all = static_cast<long*>(std::malloc(bytes + 64));
  all[0] = size;
  *block = all + 8;
  return CUDA_SUCCESS;
}
CUresult release(void* block) {
  long* const all = static_cast<long*>(block) - 8;
  memory -= all[0];
  std::free(all);
  return state();
}

std::map<std::string, long, std::less<>> counts;

/// What was done, and what on the stream that a test watches.
void count(const std::string& what, CUstream stream) {
  ++counts[what];
  if (reinterpret_cast<long>(stream) == setting("KEYFOLD_FAKE_STREAM", -1))
    ++counts[what + " there"];
}

}  // namespace

/// For tests: how often something was done.
extern "C" __attribute__((visibility("default"))) long keyfold_fake_count(const char* what) {
  const auto found = counts.find(std::string_view(what));
  return found == counts.end() ? 0 : found->second;
}

#define FAKE extern "C" __attribute__((visibility("default"))) CUresult

// NOLINTBEGIN(performance-no-int-to-ptr): addresses of the device are the host's.
FAKE cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
                                              : "CUDA_ERROR_OF_ANOTHER_KIND";
  return CUDA_SUCCESS;
}
FAKE cuGetErrorString(CUresult, const char** text) {
  *text = "as was asked for";
  return CUDA_SUCCESS;
}
FAKE cuInit(unsigned) { return CUDA_SUCCESS; }
FAKE cuDriverGetVersion(int* version) {
  *version = static_cast<int>(setting("KEYFOLD_FAKE_VERSION", 13000));
  return CUDA_SUCCESS;
}
FAKE cuDeviceGetCount(int* count) {
  *count = 2;
  return CUDA_SUCCESS;
}
FAKE cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
FAKE cuDeviceGetName(char* name, int length, CUdevice) {
  std::strncpy(name, "Fake", static_cast<std::size_t>(length));
  return CUDA_SUCCESS;
}
FAKE cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
  return CUDA_SUCCESS;
}
FAKE cuDeviceTotalMem(std::size_t* bytes, CUdevice) {
  *bytes = std::size_t{1} << 30;
  return CUDA_SUCCESS;
}
FAKE cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  static char primary;
  *context = reinterpret_cast<CUcontext>(&primary);
  return CUDA_SUCCESS;
}
FAKE cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
FAKE cuCtxPopCurrent(CUcontext* context) {
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
FAKE cuMemAlloc(CUdeviceptr* address, std::size_t bytes) {
  void* block = nullptr;
  const CUresult result = allocate(&block, bytes);
  *address = reinterpret_cast<CUdeviceptr>(block);
  return result;
}
FAKE cuMemFree(CUdeviceptr address) { return release(reinterpret_cast<void*>(address)); }
FAKE cuMemHostAlloc(void** block, std::size_t bytes, unsigned) { return allocate(block, bytes); }
FAKE cuMemFreeHost(void* block) { return release(block); }
FAKE cuMemPoolCreate(CUmemoryPool* pool, const CUmemPoolProps*) { return make(pool); }
FAKE cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void*) { return state(); }
FAKE cuMemAllocFromPoolAsync(CUdeviceptr* address, std::size_t bytes, CUmemoryPool,
                             CUstream stream) {
  count("stream allocation", stream);
  return cuMemAlloc(address, bytes);
}
FAKE cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  count("stream free", stream);
  return cuMemFree(address);
}
FAKE cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
  const bool type = which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
  if (address == static_cast<CUdeviceptr>(setting("KEYFOLD_FAKE_UNKNOWN", 0)))
    return CUDA_ERROR_INVALID_VALUE;
  *static_cast<int*>(value) =
      type ? int{CU_MEMORYTYPE_DEVICE} : static_cast<int>(setting("KEYFOLD_FAKE_OWNER", 0));
  return CUDA_SUCCESS;
}
FAKE cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) {
  count("copy", stream);
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return state();
}
FAKE cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
  count("copy", stream);
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return state();
}
FAKE cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t bytes, CUstream) {
  std::memset(reinterpret_cast<void*>(to), value, bytes);
  return state();
}
FAKE cuStreamCreate(CUstream* stream, unsigned) { return make(stream); }
FAKE cuStreamDestroy(CUstream stream) { return destroy(stream); }
FAKE cuStreamQuery(CUstream stream) {
  count("flush", stream);
  return state();
}
FAKE cuStreamGetCtx(CUstream, CUcontext* context) {
  *context = setting("KEYFOLD_FAKE_OTHER_CONTEXT", 0) != 0 ? nullptr : contexts.back();
  return state();
}
FAKE cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = static_cast<CUstreamCaptureStatus>(setting("KEYFOLD_FAKE_CAPTURE", 0));
  return state();
}
FAKE cuStreamSynchronize(CUstream stream) {
  count("wait", stream);
  return state();
}
FAKE cuStreamWaitEvent(CUstream, CUevent, unsigned) { return state(); }
FAKE cuEventCreate(CUevent* event, unsigned) { return make(event); }
FAKE cuEventDestroy(CUevent event) { return destroy(event); }
FAKE cuEventRecord(CUevent, CUstream stream) {
  count("event", stream);
  return state();
}
FAKE cuEventSynchronize(CUevent) {
  count("wait", nullptr);
  return state();
}
FAKE cuEventElapsedTime(float* milliseconds, CUevent, CUevent) {
  *milliseconds = 1;
  return state();
}
FAKE cuModuleLoadData(CUmodule* module, const void* image) {
  return std::memcmp(image,
                     "\x7f"
                     "ELF",
                     4) == 0
             ? make(module)
             : CUDA_ERROR_INVALID_IMAGE;
}
FAKE cuModuleUnload(CUmodule module) { return destroy(module); }
FAKE cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
  static char any;
  *function = reinterpret_cast<CUfunction>(&any);
  return state();
}
FAKE cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return state(); }
FAKE cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void**, void**) {
  const CUresult now = state();
  count("launch", config->hStream);
  if (++launches == setting("KEYFOLD_FAKE_FAULT_AT", 0)) fault = CUDA_ERROR_ILLEGAL_ADDRESS;
  return now;  // what a kernel does wrong shows in what follows
}
FAKE cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
// NOLINTEND(performance-no-int-to-ptr)

FAKE cuGetProcAddress(const char* symbol, void** function, int, cuuint64_t,
                      CUdriverProcAddressQueryResult*) {
#define X(name, fake) \
  if (std::string_view(symbol) == #fake) *function = reinterpret_cast<void*>(&::fake);
  KEYFOLD_CUDA_FUNCTIONS(X)
#undef X
  const bool versioned = std::string_view(symbol).find("_v") != std::string_view::npos;
  return versioned || *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

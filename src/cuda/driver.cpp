// Finding the driver's functions.
#include "cuda/driver.hpp"

#include <cstdlib>

#include "cuda/library.hpp"

namespace keyfold::cuda {
namespace {

#ifdef _WIN32
constexpr const char* kLibrary = "nvcuda.dll";
#else
constexpr const char* kLibrary = "libcuda.so.1";
#endif

/// "CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)".
std::string describe(CUresult code) {
  const char *name = nullptr, *text = nullptr;
  if (const Driver* driver = Driver::get()) {
    driver->get_error_name.quietly(code, &name);
    driver->get_error_string.quietly(code, &text);
  }
  if (name == nullptr) return "error " + std::to_string(static_cast<int>(code));
  return std::string(name) + " (" + (text ? text : "") + ")";
}

}  // namespace

Failure::Failure(const char* function, CUresult code)
    : std::runtime_error(std::string(function) + ": " + describe(code)), code_(code) {}

void Driver::launch(CUfunction function, const std::array<unsigned, 3>& grid, unsigned threads,
                    unsigned shared_bytes, CUstream stream, void** arguments, bool overlaps,
                    bool clusters) const {
  std::array<CUlaunchAttribute, 2> attributes{};
  unsigned count = 0;
  if (overlaps) {
    CUlaunchAttribute& attribute = attributes[count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  if (clusters) {
    CUlaunchAttribute& attribute = attributes[count++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {grid[0], 1, 1};
  }
  CUlaunchConfig config{};
  config.gridDimX = grid[0];
  config.gridDimY = grid[1];
  config.gridDimZ = grid[2];
  config.blockDimX = threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = shared_bytes;
  config.hStream = stream;
  config.attrs = attributes.data();
  config.numAttrs = count;
  launch_kernel_ex(static_cast<const CUlaunchConfig*>(&config), function, arguments,
                   static_cast<void**>(nullptr));
}

bool Failure::fatal() const {
  switch (code_) {
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
    case CUDA_ERROR_DEINITIALIZED: return true;
    default: return false;
  }
}

bool Driver::open() {
  Library library;
  const char* const fake = std::getenv("KEYFOLD_CUDA_DRIVER");  // of tests
  if (!library.open(fake != nullptr ? fake : kLibrary)) return false;
  bool whole = true;
#define X(name, function) whole = set((name), #function, library.symbol(#function)) && whole;
  KEYFOLD_CUDA_BASICS(X)
#undef X
  if (!whole) return false;
  // No driver module, no device, a container without one: there is nothing to list.
  if (init.quietly(0u) != CUDA_SUCCESS || driver_get_version.quietly(&version_) != CUDA_SUCCESS ||
      device_get_count.quietly(&device_count_) != CUDA_SUCCESS) {
    return false;
  }
  if (version_ < kOldest) {
    missing_ = "the NVIDIA driver is one for CUDA " + version_text(version_) +
               ", and keyfold needs one for CUDA " + version_text(kOldest) + " or newer: update it";
    return device_count_ > 0;
  }
  // Names have versions: this one gives each function as it was in that version of CUDA.
  const auto find =
      reinterpret_cast<decltype(&::cuGetProcAddress)>(library.symbol("cuGetProcAddress_v2"));
  const auto load = [&](const char* function) -> void* {
    void* found = nullptr;
    CUdriverProcAddressQueryResult status{};
    if (find != nullptr &&
        find(function, &found, kOldest, CU_GET_PROC_ADDRESS_DEFAULT, &status) == CUDA_SUCCESS) {
      return found;
    }
    return nullptr;
  };
#define X(name, function) \
  if (!set((name), #function, load(#function))) missing_ = "the NVIDIA driver has no " #function;
  KEYFOLD_CUDA_FUNCTIONS(X)
#undef X
  return device_count_ > 0;
}

const Driver* Driver::get() {
  // Never closed: a thread may still compute while the process exits.
  static const Driver* const driver = [] {
    auto* made = new Driver;
    if (made->open()) return made;
    delete made;
    return static_cast<Driver*>(nullptr);
  }();
  return driver;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace keyfold::cuda

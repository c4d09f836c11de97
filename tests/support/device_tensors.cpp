// Copies to a CUDA device and back.
#include "support/device_tensors.hpp"

#include <cstdlib>
#include <string_view>

#ifdef KEYFOLD_CUDA
#include "cuda/driver.hpp"
#endif

namespace keyfold::test {
namespace {

/// From the first element to the last.
std::size_t span_bytes(const TensorView& t) {
  std::int64_t last = 0;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    if (t.sizes[axis] == 0) return 0;
    if (t.sizes[axis] > 1) last += (t.sizes[axis] - 1) * t.strides[axis];
  }
  return static_cast<std::size_t>((last + 1) * size_of(t.dtype));
}

}  // namespace

bool on_device(const std::string& backend, const Call& call) {
  const char* const wanted = std::getenv("KEYFOLD_TEST_MEMORY");
  if (wanted == nullptr || std::string_view(wanted) != "device" || !backend.starts_with("cuda"))
    return false;
  constexpr std::size_t kMost = std::size_t{1} << 30;
  for (const TensorView& t : {call.q, call.k, call.v})
    if (span_bytes(t) > kMost) return false;
  return true;
}

#ifdef KEYFOLD_CUDA

struct DeviceTensors::Impl {
  const cuda::Driver& driver;
  keyfold::Device device;
  CUcontext context = nullptr;
  CUstream stream = nullptr;
  std::vector<CUdeviceptr> memory = {};

  /// As far past a multiple of 16 bytes as on the host.
  void* copy(const void* from, std::size_t bytes) {
    const cuda::Scope scope(driver, context);
    const auto past = reinterpret_cast<std::uintptr_t>(from) % 16;
    CUdeviceptr address = 0;
    driver.mem_alloc(&address, bytes + past + 4);
    memory.push_back(address);
    address += past;
    if (bytes > 0) driver.memcpy_htod_async(address, from, bytes, stream);
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  }
};

DeviceTensors::DeviceTensors(const std::string& backend)
    : impl_(new Impl{
          *cuda::Driver::get(),
          {DeviceType::kCuda, backend == "cuda" ? 0 : std::stoi(backend.substr(sizeof "cuda"))}}) {
  CUdevice device = 0;
  impl_->driver.device_get(&device, impl_->device.index);
  impl_->driver.device_primary_ctx_retain(&impl_->context, device);
  const cuda::Scope scope(impl_->driver, impl_->context);
  impl_->driver.stream_create(&impl_->stream, CU_STREAM_NON_BLOCKING);
}

DeviceTensors::~DeviceTensors() {
  const cuda::Driver& driver = impl_->driver;
  driver.ctx_push_current.quietly(impl_->context);
  driver.stream_synchronize.quietly(impl_->stream);
  for (const CUdeviceptr address : impl_->memory) driver.mem_free.quietly(address);
  driver.stream_destroy.quietly(impl_->stream);
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
}

void* DeviceTensors::stream() const { return impl_->stream; }

TensorView DeviceTensors::copy(const TensorView& from) {
  TensorView to = from;
  to.data = impl_->copy(from.data, span_bytes(from));
  to.device = impl_->device;
  return to;
}

MutableTensorView DeviceTensors::copy(const MutableTensorView& from) {
  MutableTensorView to = from;
  to.data = impl_->copy(from.data, span_bytes(from));
  to.device = impl_->device;
  return to;
}

Call DeviceTensors::copy(const Call& call) {
  Call there = call;
  there.q = copy(call.q);
  there.k = copy(call.k);
  there.v = copy(call.v);
  AttentionOptions& options = there.options;
  if (options.mask) options.mask = copy(*options.mask);
  if (options.sinks) options.sinks = copy(*options.sinks);
  options.run.stream = stream();
  return there;
}

const std::int32_t* DeviceTensors::copy(const std::vector<std::int32_t>& lengths) {
  return static_cast<const std::int32_t*>(impl_->copy(lengths.data(), 4 * lengths.size()));
}

void DeviceTensors::fetch(const MutableTensorView& from, const MutableTensorView& to) {
  const cuda::Scope scope(impl_->driver, impl_->context);
  impl_->driver.memcpy_dtoh_async(to.data, reinterpret_cast<CUdeviceptr>(from.data),
                                  span_bytes(from), impl_->stream);
}

void DeviceTensors::finish() {
  const cuda::Scope scope(impl_->driver, impl_->context);
  impl_->driver.stream_synchronize(impl_->stream);
}

#else

struct DeviceTensors::Impl {};
DeviceTensors::DeviceTensors(const std::string&) { std::abort(); }
DeviceTensors::~DeviceTensors() = default;
void* DeviceTensors::stream() const { return nullptr; }
TensorView DeviceTensors::copy(const TensorView& from) { return from; }
MutableTensorView DeviceTensors::copy(const MutableTensorView& from) { return from; }
Call DeviceTensors::copy(const Call& call) { return call; }
const std::int32_t* DeviceTensors::copy(const std::vector<std::int32_t>&) { return nullptr; }
void DeviceTensors::fetch(const MutableTensorView&, const MutableTensorView&) {}
void DeviceTensors::finish() {}

#endif

}  // namespace keyfold::test

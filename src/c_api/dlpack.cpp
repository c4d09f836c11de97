// Checks what a DLTensor may hold beyond a view: device, lanes, rank, dtype code, missing strides.
#include "c_api/dlpack.hpp"

#include <string>

#include "c_api/guard.hpp"

namespace keyfold::c_api {
namespace {

std::string expected(const std::string& what, const std::string& got) {
  return "expected " + what + ", got " + got;
}

// Strides of a compact row-major tensor; the sizes are the caller's and may be anything.
void compact_strides(const DLTensor& tensor, const char* argument, std::int64_t* strides) {
  std::int64_t stride = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    if (__builtin_mul_overflow(stride, tensor.shape[axis], &stride)) {
      throw InvalidArgument(argument, "the product of its sizes overflows 64 bits");
    }
  }
}

// Pinned memory of the host is the host's; managed memory is that of the device that it names.
Device device_of(const DLDevice& device, const char* argument) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: return {};
    case kDLCUDA:
    case kDLCUDAManaged: return {DeviceType::kCuda, device.device_id};
    default: break;
  }
  throw InvalidArgument(argument, expected("device type kDLCPU (1) or kDLCUDA (2)",
                                           std::to_string(static_cast<int>(device.device_type))));
}

}  // namespace

DType dtype_of(const DLDataType& dtype, const char* argument) {
  const int code = dtype.code, bits = dtype.bits;
  if (dtype.lanes != 1) {
    throw InvalidArgument(argument, expected("dtype lanes 1", std::to_string(dtype.lanes)));
  }
  if (code == kDLFloat && bits == 32) return DType::kFloat32;
  if (code == kDLFloat && bits == 16) return DType::kFloat16;
  if (code == kDLBfloat && bits == 16) return DType::kBFloat16;
  if ((code == KEYFOLD_DL_BOOL || code == kDLUInt) && bits == 8) return DType::kBool;
  throw InvalidArgument(
      argument,
      expected(
          "dtype kDLFloat of 32 or 16 bits, kDLBfloat of 16, or for masks bool or kDLUInt of 8",
          "code " + std::to_string(code) + " of " + std::to_string(bits) + " bits"));
}

DLDataType dl_dtype_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {kDLFloat, 32, 1};
    case DType::kFloat16: return {kDLFloat, 16, 1};
    case DType::kBFloat16: return {kDLBfloat, 16, 1};
    case DType::kBool: break;
  }
  return {KEYFOLD_DL_BOOL, 8, 1};
}

MutableTensorView view_of(const DLTensor* pointer, const char* argument,
                          std::initializer_list<int> short_axes) {
  const DLTensor& tensor = deref(pointer, argument);
  const Device device = device_of(tensor.device, argument);
  const int short_rank = static_cast<int>(short_axes.size());
  if (tensor.ndim != 4 && (short_rank == 0 || tensor.ndim != short_rank)) {
    throw InvalidArgument(
        argument, expected(short_rank == 0 ? "ndim 4" : "ndim 4 or " + std::to_string(short_rank),
                           std::to_string(tensor.ndim)));
  }
  if (tensor.shape == nullptr) throw InvalidArgument(argument, "expected a shape, got NULL");

  MutableTensorView view(nullptr, dtype_of(tensor.dtype, argument), {1, 1, 1, 1}, {1, 1, 1, 1});
  Dims strides;
  if (tensor.strides == nullptr) compact_strides(tensor, argument, strides.data());
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    const int to = tensor.ndim == 4 ? axis : short_axes.begin()[axis];
    view.sizes[to] = tensor.shape[axis];
    view.strides[to] = tensor.strides == nullptr ? strides[axis] : tensor.strides[axis];
  }
  view.device = device;
  if (tensor.data != nullptr) view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

std::optional<MutableTensorView> optional_view_of(const DLTensor* tensor, const char* argument,
                                                  std::initializer_list<int> short_axes) {
  if (tensor == nullptr) return std::nullopt;
  return view_of(tensor, argument, short_axes);
}

}  // namespace keyfold::c_api

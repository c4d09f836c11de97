// Non-owning views of the tensors that a call reads and writes.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace keyfold {

/// Element types. kBool is for masks only: one byte, 0 = hidden, anything else = visible.
enum class DType : std::uint8_t {
  kFloat32,   ///< IEEE binary32
  kFloat16,   ///< IEEE binary16
  kBFloat16,  ///< the upper half of a binary32
  kBool,      ///< one byte per element
};

/// Bytes of one element.
constexpr std::int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBool ? 1 : 2;
}

/// "float32", "float16", "bfloat16" or "bool".
constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

/// Where memory is.
enum class DeviceType : std::uint8_t {
  kCpu,   ///< memory of the host
  kCuda,  ///< memory that kernels of a CUDA device read and write
};

/// A device; its index is that of the CUDA runtime, and 0 for the host.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;

  bool operator==(const Device&) const = default;
};

/// Four extents or strides, always in the order [batch, heads, len, dim].
using Dims = std::array<std::int64_t, 4>;

/// Strides, in elements, of a dense tensor whose last axis is innermost.
constexpr Dims dense_strides(const Dims& sizes) {
  return {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1};
}

/// A tensor to read: it owns nothing, and `data` must outlive the call (or the AttentionState).
/// Set `device` for memory on a CUDA device: scaled_dot_product_attention() says what holds then.
///
/// Axes are [batch, heads, len, dim]; any memory order is expressed by strides, so a
/// [batch, len, heads, dim] array is passed with its strides permuted. Strides count elements;
/// 0 repeats (broadcasts) an axis; negative strides are refused, except on an axis of size 1, where
/// a stride means nothing.
struct TensorView {
  const void* data = nullptr;     ///< first element, aligned to the element size
  DType dtype = DType::kFloat32;  ///< element type
  Dims sizes{};                   ///< extents
  Dims strides{};                 ///< strides in elements
  Device device{};                ///< where `data` is

  TensorView() = default;
  TensorView(const void* first, DType type, const Dims& extents, const Dims& steps)
      : data(first), dtype(type), sizes(extents), strides(steps) {}
  /// A dense tensor.
  TensorView(const void* first, DType type, const Dims& extents)
      : TensorView(first, type, extents, dense_strides(extents)) {}
};

/// A tensor to write. As TensorView, but no two elements may share memory (no stride of 0).
struct MutableTensorView {
  void* data = nullptr;           ///< first element, aligned to the element size
  DType dtype = DType::kFloat32;  ///< element type
  Dims sizes{};                   ///< extents
  Dims strides{};                 ///< strides in elements
  Device device{};                ///< where `data` is

  MutableTensorView() = default;
  MutableTensorView(void* first, DType type, const Dims& extents, const Dims& steps)
      : data(first), dtype(type), sizes(extents), strides(steps) {}
  /// A dense tensor.
  MutableTensorView(void* first, DType type, const Dims& extents)
      : MutableTensorView(first, type, extents, dense_strides(extents)) {}

  /// The same memory, to read.
  operator TensorView() const {
    TensorView view(data, dtype, sizes, strides);
    view.device = device;
    return view;
  }
};

}  // namespace keyfold

// float16 and bfloat16 as bits, converted one by one. Kernels have vector forms of their own.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "keyfold/tensor.hpp"

namespace keyfold::core {

inline float bfloat16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Round to nearest even; NaN stays NaN.
inline std::uint16_t float_to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float16_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1f;
  const std::uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | (biased << 23) | (mantissa << 13));
}

/// Round to nearest even, overflow to Inf; NaN stays NaN.
inline std::uint16_t float_to_float16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 below
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000));
  }
  const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

/// The element of a float tensor (not kBool) at `data`.
inline float load_float(const void* data, DType dtype) {
  std::uint16_t bits = 0;
  if (dtype == DType::kFloat32) {
    float value = 0;
    std::memcpy(&value, data, sizeof value);
    return value;
  }
  std::memcpy(&bits, data, sizeof bits);
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

/// Rounds `value` to the dtype (not kBool) and stores it at `data`.
inline void store_float(void* data, DType dtype, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(data, &value, sizeof value);
    return;
  }
  const std::uint16_t bits =
      dtype == DType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
  std::memcpy(data, &bits, sizeof bits);
}

/// Address of an element of a view.
inline const std::byte* element(const TensorView& t, std::int64_t b, std::int64_t h, std::int64_t i,
                                std::int64_t d) {
  return static_cast<const std::byte*>(t.data) +
         (b * t.strides[0] + h * t.strides[1] + i * t.strides[2] + d * t.strides[3]) *
             size_of(t.dtype);
}
inline std::byte* element(const MutableTensorView& t, std::int64_t b, std::int64_t h,
                          std::int64_t i, std::int64_t d) {
  return const_cast<std::byte*>(element(TensorView(t), b, h, i, d));
}

}  // namespace keyfold::core

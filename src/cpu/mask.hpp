// A row of a mask as float32 biases.
#pragma once

#include <cmath>
#include <cstring>

#include "core/half.hpp"

namespace keyfold::cpu {

/// bias[j] for keys [begin, end) of query row `row` of a head: 0 or -inf from a boolean mask, the
/// value itself from an additive one. bias[j] is stored at out[j - origin]. Returns whether any key
/// is visible.
inline bool gather_bias(const TensorView& mask, std::int64_t batch, std::int64_t head,
                        std::int64_t row, std::int64_t begin, std::int64_t end, std::int64_t origin,
                        float* out) {
  const std::byte* p = core::element(mask, batch, head, row, begin);
  const std::int64_t step = mask.strides[3] * size_of(mask.dtype);
  float* const bias = out + (begin - origin);
  const std::int64_t count = end - begin;
  if (mask.dtype == DType::kBool) {
    for (std::int64_t j = 0; j < count; ++j) {
      bias[j] = p[j * step] != std::byte{0} ? 0.0f : -INFINITY;
    }
  } else if (mask.dtype == DType::kFloat32 && mask.strides[3] == 1) {
    std::memcpy(bias, p, static_cast<std::size_t>(count) * sizeof(float));
  } else {
    for (std::int64_t j = 0; j < count; ++j) bias[j] = core::load_float(p + j * step, mask.dtype);
  }
  bool any = false;
  for (std::int64_t j = 0; j < count; ++j) any |= bias[j] != -INFINITY;
  return any;
}

}  // namespace keyfold::cpu

// Copies a tensor in host memory from one layout to another.
#pragma once

#include <cstring>

#include "core/half.hpp"

namespace keyfold::core {

/// All elements of `from` to those of `to`, which has the same sizes and dtype.
inline void copy_tensor(const TensorView& from, const MutableTensorView& to) {
  const auto size = static_cast<std::size_t>(size_of(to.dtype));
  const bool dense_rows = from.strides[3] == 1 && to.strides[3] == 1;
  for (std::int64_t b = 0; b < to.sizes[0]; ++b) {
    for (std::int64_t h = 0; h < to.sizes[1]; ++h) {
      for (std::int64_t i = 0; i < to.sizes[2]; ++i) {
        if (dense_rows) {
          std::memcpy(element(to, b, h, i, 0), element(from, b, h, i, 0),
                      static_cast<std::size_t>(to.sizes[3]) * size);
          continue;
        }
        for (std::int64_t d = 0; d < to.sizes[3]; ++d) {
          std::memcpy(element(to, b, h, i, d), element(from, b, h, i, d), size);
        }
      }
    }
  }
}

}  // namespace keyfold::core

// Reads what a parser says is there, so that the address sanitizer checks that it is.
#pragma once

#include <cstdlib>

#include "io/layout.hpp"

namespace keyfold::fuzz {

inline void touch(const io::TensorLayout& tensor) {
  [[maybe_unused]] volatile std::byte sink{};
  if (!tensor.data.empty()) {
    sink = tensor.data.front();
    sink = tensor.data.back();
  }
  // The last element by the strides must lie inside the data as well.
  std::int64_t last = 0;
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    if (tensor.shape[axis] == 0) return;
    last += (tensor.shape[axis] - 1) * tensor.strides[axis];
  }
  const auto end = static_cast<std::size_t>((last + 1) * size_of(tensor.dtype));
  if (end != tensor.data.size()) std::abort();
}

}  // namespace keyfold::fuzz

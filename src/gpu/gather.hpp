// Copies of strided host tensors, dense as the kernels read them.
#pragma once

#include <cstddef>
#include <span>

#include "core/problem.hpp"
#include "keyfold/tensor.hpp"

namespace keyfold::gpu {

/// A range of rows of one head of a tensor, and where it goes.
struct RowsCopy {
  const TensorView* from = nullptr;
  std::int64_t batch = 0, head = 0;
  core::KeyRange rows;
  std::byte* to = nullptr;
  std::int64_t width = 0;  ///< bytes of a row in `to`; what is behind the row's own end becomes 0
  std::int64_t pitch = 0;  ///< bytes from row to row in `to`
};

/// Copies; what is large on several threads of the caller's arena.
void copy_rows(std::span<const RowsCopy> copies);

}  // namespace keyfold::gpu

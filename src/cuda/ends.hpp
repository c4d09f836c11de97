// Where rows come from and where they go, when tensors are on the device. In bytes.
#pragma once

#include "core/backend.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

/// A tensor [batch, heads, len, dim] as rows with the heads of a group innermost.
struct TensorRows {
  gpu::Address at = 0;
  std::int64_t batch = 0, group = 0, head = 0, row = 0, column = 0;
};
/// Row `row` on of a tensor with this many heads in a group.
TensorRows rows_of(const TensorView& tensor, std::int64_t heads, std::int64_t row);

/// What a kernel does at both ends of the keys: kernels/results.cuh has its twin, and its words.
struct Ends {
  TensorRows q, out, lse;
  gpu::Address sinks = 0;
  std::int64_t sink_step = 0;
  std::uint32_t sinks_type = 0, out_type = 0;
  std::uint32_t value_dim = 0;
  std::uint32_t begins = 0;
};
static_assert(sizeof(Ends) == 3 * 48 + 2 * 8 + 4 * 4);

/// A dtype's number in kernels.
std::uint32_t type_of(DType dtype);

/// The results of a block of rows, and its sinks, for a call on tensors on the device.
Ends results_of(const core::Problem& problem, const core::Block& block,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse);
/// Whether rows of so many columns are whole words of 16 bytes, and lie at multiples of these.
bool in_words(const TensorRows& rows, DType dtype, std::int64_t columns);
/// Whether a kernel can write rows of `out` two elements at a time.
bool in_pairs(const Ends& ends, DType dtype);

}  // namespace keyfold::cuda

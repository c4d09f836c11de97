// Addresses and strides.
#include "cuda/ends.hpp"

#include "gpu/cast.hpp"

namespace keyfold::cuda {

TensorRows rows_of(const TensorView& t, std::int64_t heads, std::int64_t row) {
  const std::int64_t size = size_of(t.dtype);
  // The stride of a single element means nothing.
  const auto step = [&](std::size_t axis) {
    return t.sizes[axis] == 1 ? 0 : t.strides[axis] * size;
  };
  TensorRows rows{.at = reinterpret_cast<gpu::Address>(t.data),
                  .batch = step(0),
                  .group = heads * step(1),
                  .head = step(1),
                  .row = step(2),
                  .column = t.sizes[3] == 1 ? size : step(3)};
  rows.at += static_cast<gpu::Address>(row * rows.row);
  return rows;
}

std::uint32_t type_of(DType dtype) { return static_cast<std::uint32_t>(dtype); }

Ends results_of(const core::Problem& problem, const core::Block& block,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  const std::int64_t heads = problem.group_size();
  Ends ends{.q = {},
            .out = rows_of(out, heads, block.row_begin),
            .lse = lse ? rows_of(*lse, heads, block.row_begin) : TensorRows{},
            .out_type = type_of(out.dtype),
            .value_dim = gpu::u32(problem.shape.value_dim)};
  if (const auto& sinks = problem.device_sinks) {
    ends.sinks = reinterpret_cast<gpu::Address>(sinks->data);
    ends.sink_step = sinks->strides[1] * size_of(sinks->dtype);
    ends.sinks_type = type_of(sinks->dtype);
  }
  return ends;
}

namespace {

bool lies_at(const TensorRows& rows, std::int64_t bytes, DType dtype, std::int64_t columns) {
  const std::int64_t size = size_of(dtype);
  for (const std::int64_t step : {static_cast<std::int64_t>(rows.at), rows.batch, rows.group,
                                  rows.head, rows.row, columns * size})
    if (step % bytes != 0) return false;
  return rows.column == size;
}

}  // namespace

bool in_words(const TensorRows& rows, DType dtype, std::int64_t columns) {
  return lies_at(rows, 16, dtype, columns);
}

bool in_pairs(const Ends& ends, DType dtype) {
  return lies_at(ends.out, 2 * size_of(dtype), dtype, ends.value_dim);
}

}  // namespace keyfold::cuda

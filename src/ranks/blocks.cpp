// Whole groups first, rows of a group where it must be: packed keys serve all rows of a group.
#include "ranks/blocks.hpp"

#include <algorithm>

namespace keyfold::ranks {
namespace {

/// Fewer rows than this make a slow kernel, whatever block_bytes says.
constexpr std::int64_t kLeastRows = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::vector<Block> plan_blocks(const core::Problem& problem, const std::vector<Owned>& owned,
                               std::int64_t block_bytes) {
  const AttentionShape& s = problem.shape;
  std::int64_t most_rows = 0, rows = 0;
  for (const Owned& it : owned) {
    most_rows = std::max(most_rows, it.row_end - it.row_begin);
    rows += it.row_end - it.row_begin;
  }
  if (rows == 0) return {};
  const std::int64_t row_bytes = problem.group_size() * (s.value_dim + 2) * 4;
  const std::int64_t group_bytes = rows * row_bytes;
  const std::int64_t groups =
      std::clamp<std::int64_t>(block_bytes / group_bytes, 1, s.batch * s.num_kv_heads);
  const std::int64_t kv_heads = std::min(groups, s.num_kv_heads);
  const std::int64_t batches = std::max<std::int64_t>(1, groups / s.num_kv_heads);
  const std::int64_t cuts = std::clamp<std::int64_t>(ceil_div(group_bytes, block_bytes), 1,
                                                     ceil_div(most_rows, kLeastRows));
  const std::int64_t cut_rows = ceil_div(most_rows, cuts);

  std::vector<Block> blocks;
  for (std::int64_t row = 0; row < most_rows; row += cut_rows) {
    for (std::int64_t batch = 0; batch < s.batch; batch += batches) {
      for (std::int64_t head = 0; head < s.num_kv_heads; head += kv_heads) {
        blocks.emplace_back();
        for (const Owned& it : owned) {
          const std::int64_t begin = it.row_begin + row;
          const std::int64_t end = std::min(it.row_end, begin + cut_rows);
          if (begin >= end) continue;
          blocks.back().push_back({it.owner, batch, std::min(s.batch, batch + batches), head,
                                   std::min(s.num_kv_heads, head + kv_heads), begin, end});
        }
      }
    }
  }
  return blocks;
}

TensorView shifted(TensorView view, std::int64_t batch, std::int64_t head, std::int64_t row) {
  const std::int64_t elements =
      batch * view.strides[0] + head * view.strides[1] + row * view.strides[2];
  view.data =
      reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(view.data) -
                                    static_cast<std::uintptr_t>(elements * size_of(view.dtype)));
  return view;
}

MutableTensorView slice_view(const core::Problem& problem, const Slice& slice, void* data,
                             DType dtype, std::int64_t dim) {
  const AttentionShape& s = problem.shape;
  const Dims sizes{slice.batch_end - slice.batch_begin,
                   (slice.kv_head_end - slice.kv_head_begin) * problem.group_size(), slice.rows(),
                   dim};
  const TensorView moved =
      shifted({data, dtype, {s.batch, s.num_heads, s.q_len, dim}, dense_strides(sizes)},
              slice.batch_begin, slice.kv_head_begin * problem.group_size(), slice.row_begin);
  return {const_cast<void*>(moved.data), dtype, moved.sizes, moved.strides};
}

}  // namespace keyfold::ranks

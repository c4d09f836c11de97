// Whole groups first, rows of a group where it must be: packed keys serve all rows of a group.
#include "ranks/blocks.hpp"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>

#include "keyfold/context_parallel.hpp"

namespace keyfold::ranks {
namespace {

/// Fewer rows than this make a slow kernel, whatever block_bytes says.
constexpr std::int64_t kLeastRows = 16;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

std::vector<Owned> owned_rows(std::span<const std::int64_t> counts, std::int64_t row_stripe_len) {
  const auto num_ranks = static_cast<int>(counts.size());
  const std::int64_t q_len = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  std::vector<Owned> owned;
  std::int64_t first = 0;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const std::int64_t count = counts[static_cast<std::size_t>(rank)];
    std::vector<KeySpan> spans{{first, first + count}};
    if (row_stripe_len > 0) spans = shard_rows(q_len, num_ranks, rank, row_stripe_len);
    std::int64_t local = 0;
    for (const KeySpan& rows : spans) {
      owned.push_back({rank, rows.begin, rows.end, rows.begin - local});
      local += rows.end - rows.begin;
    }
    if (local != count) {
      throw InvalidArgument("q", "expected " + std::to_string(local) + " rows on rank " +
                                     std::to_string(rank) + ", its stripes of " +
                                     std::to_string(row_stripe_len) + " of the " +
                                     std::to_string(q_len) + " rows of all ranks, got " +
                                     std::to_string(count) + "; see shard_rows()");
    }
    first += count;
  }
  return owned;
}

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
                                   std::min(s.num_kv_heads, head + kv_heads), begin, end,
                                   it.shift});
        }
      }
    }
  }
  return blocks;
}

TensorView shifted(TensorView view, std::int64_t batch, std::int64_t head, std::int64_t row) {
  const std::int64_t elements =
      batch * view.strides[0] + head * view.strides[1] + row * view.strides[2];
  view.data = static_cast<const std::byte*>(view.data) - elements * size_of(view.dtype);
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

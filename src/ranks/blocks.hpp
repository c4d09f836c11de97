// How the rows of a call are cut into the blocks that travel between the ranks.
#pragma once

#include <vector>

#include "core/problem.hpp"

namespace keyfold::ranks {

/// Batch entries x key/value heads (with the query heads that share them) x query rows, whose
/// results `owner` gets, or with kAll every rank.
struct Slice {
  static constexpr int kAll = -1;

  int owner = kAll;
  std::int64_t batch_begin = 0, batch_end = 0;
  std::int64_t kv_head_begin = 0, kv_head_end = 0;
  std::int64_t row_begin = 0, row_end = 0;

  std::int64_t rows() const { return row_end - row_begin; }
  /// Query rows of all its heads.
  std::int64_t states(const core::Problem& problem) const {
    return (batch_end - batch_begin) * (kv_head_end - kv_head_begin) * problem.group_size() *
           rows();
  }
};

/// Slices that are computed and sent together: one for all ranks, or one for each owner that has
/// rows left.
using Block = std::vector<Slice>;

/// The rows of each owner: one entry for Slice::kAll, or one per rank.
struct Owned {
  int owner = Slice::kAll;
  std::int64_t row_begin = 0, row_end = 0;
};

/// Blocks of about `block_bytes` of state.
std::vector<Block> plan_blocks(const core::Problem& problem, const std::vector<Owned>& owned,
                               std::int64_t block_bytes);

/// A dense float tensor [batch, heads, rows, dim] of a slice, as one of the whole call: only the
/// slice's elements may be touched.
MutableTensorView slice_view(const core::Problem& problem, const Slice& slice, void* data,
                             DType dtype, std::int64_t dim);

/// The same memory seen from an origin that lies so many entries before its first element.
TensorView shifted(TensorView view, std::int64_t batch, std::int64_t head, std::int64_t row);

}  // namespace keyfold::ranks

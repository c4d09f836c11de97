// How the rows of a call are cut into the blocks that travel between the ranks.
#pragma once

#include <span>
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
  std::int64_t shift = 0;  ///< of the owner's tensors: its row for row i is i - shift

  std::int64_t rows() const { return row_end - row_begin; }
  /// Query rows of all its heads.
  std::int64_t states(const core::Problem& problem) const {
    return (batch_end - batch_begin) * (kv_head_end - kv_head_begin) * problem.group_size() *
           rows();
  }
};

/// Slices that are computed and sent together, owner by owner.
using Block = std::vector<Slice>;

/// Rows that follow each other and their owner: all of Slice::kAll, or some of each rank.
struct Owned {
  int owner = Slice::kAll;
  std::int64_t row_begin = 0, row_end = 0;
  std::int64_t shift = 0;  ///< as a Slice's
};

/// Who has which rows when rank r has counts[r] of them, rank by rank. Throws InvalidArgument where
/// stripes would give the ranks other numbers of rows.
std::vector<Owned> owned_rows(std::span<const std::int64_t> counts, std::int64_t row_stripe_len);

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

// What attention should give: the formula, row by row, in float64, and naively in the inputs'
// dtype.
#pragma once

#include <vector>

#include "keyfold/options.hpp"

namespace keyfold::test {

struct RowId {
  std::int64_t batch = 0, head = 0, row = 0;
};

/// Every row of q, heads of a group together.
std::vector<RowId> all_rows(const TensorView& q);

/// Results of some rows: out [rows, value_dim], lse [rows].
struct Rows {
  std::vector<double> out, lse;
  /// The typical error of scores and weights in float32, which a good float32 computation has too,
  /// even where the naive one is lucky. From reference() only.
  std::vector<double> out_noise, lse_noise;
};

/// Plain softmax(QK^T)V in float64. A weight that is 0 in float32 adds nothing, whatever v holds.
/// `cuts_off`: the noise is that of a matrix unit whose float32 sums are cut off, not rounded.
Rows reference(const TensorView& q, const TensorView& k, const TensorView& v,
               const AttentionOptions& options, const std::vector<RowId>& rows,
               bool cuts_off = false);

/// The naive computation of the error rule: the same plain loops in float32; for 16-bit inputs
/// the probabilities are rounded to the dtype before they meet v; out is rounded to the dtype.
Rows naive(const TensorView& q, const TensorView& k, const TensorView& v,
           const AttentionOptions& options, const std::vector<RowId>& rows);

}  // namespace keyfold::test

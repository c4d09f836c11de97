// A validated call as plain 64-bit numbers: what the planner and the backends work from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "keyfold/options.hpp"
#include "keyfold/plan.hpp"

namespace keyfold::core {

/// kv_len of a stream, whose length is not known until it ends. Far from overflow when positions
/// are added to it.
inline constexpr std::int64_t kUnknownLength = std::int64_t{1} << 60;

/// Keys [begin, end) by absolute position; empty when end <= begin.
struct KeyRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;

  std::int64_t size() const { return std::max<std::int64_t>(0, end - begin); }
  KeyRange clip(KeyRange other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
};

struct Problem {
  AttentionShape shape;                      ///< kv_len is kUnknownLength for a stream
  TensorView q;                              ///< [batch, num_heads, q_len, head_dim]
  float scale = 1;                           ///< on q.k
  float softcap = 0;                         ///< 0: none
  std::optional<std::int64_t> window_left;   ///< keys before the row's position
  std::optional<std::int64_t> window_right;  ///< keys after it; causal is 0
  std::vector<std::int64_t> q_offset;        ///< [batch] position of row 0
  std::vector<std::int64_t> key_limit;       ///< [batch] keys behind are never read
  std::optional<TensorView> mask;            ///< sizes expanded, broadcast axes have stride 0
  std::vector<float> sinks;                  ///< [num_heads], or empty
  bool keys_on_device = false;               ///< all keys and values are: none is brought there
  // For tensors on a device that is not the host:
  Device device;                                            ///< where all tensors are
  void* stream = nullptr;                                   ///< RunOptions::stream
  std::optional<TensorView> device_sinks;                   ///< instead of sinks
  std::optional<MutableTensorView> device_out, device_lse;  ///< what finish() will be given
  /// Of each batch entry; key_limit and q_offset are then those of kv_len.
  const std::int32_t* device_kv_lens = nullptr;
  bool q_offset_given = false;  ///< q_offset does not follow kv_lens

  std::int64_t group_size() const { return shape.num_heads / shape.num_kv_heads; }
  std::int64_t num_groups() const { return shape.batch * shape.num_kv_heads; }
  double flops_per_pair() const {
    return 2.0 * static_cast<double>(shape.head_dim + shape.value_dim);
  }
  /// Whether every row of a batch entry sees the same keys.
  bool rows_alike() const { return !has_window(); }
  /// Whether a row's position decides what it sees, as far as the host knows.
  bool has_window() const { return (window_left || window_right) && !device_kv_lens; }

  /// Keys that a row may see, before the mask.
  KeyRange visible(std::int64_t batch, std::int64_t row) const {
    if (!has_window()) return {0, key_limit[static_cast<std::size_t>(batch)]};
    const std::int64_t position = q_offset[static_cast<std::size_t>(batch)] + row;
    KeyRange range{0, key_limit[static_cast<std::size_t>(batch)]};
    if (window_left) range.begin = std::max<std::int64_t>(0, position - *window_left);
    if (window_right) range.end = std::min(range.end, position + *window_right + 1);
    return range;
  }
  /// Visible query-key pairs, over all query heads, inside a box.
  double visible_pairs(const ChunkBox& box) const;
  /// Rows of [begin, end) of any batch entry that see a key in `keys`.
  KeyRange rows_seeing(KeyRange keys, KeyRange rows) const;
};

/// `scale`, `softcap`, masks, ... checked and resolved; `kv_len` may be kUnknownLength.
/// k and v are checked by check_keys(). Throws InvalidArgument.
Problem make_problem(const AttentionShape& shape, const TensorView* q,
                     const AttentionOptions& options);

}  // namespace keyfold::core

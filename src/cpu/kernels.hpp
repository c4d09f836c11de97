// The CPU kernels as the backend sees them: plain functions, one set per instruction set.
//
// One arithmetic serves prefill and decode. A score is one chain of fused multiply-adds over
// head_dim, a split's output one chain over its keys, its sum 16 chains (by key modulo 16) and a
// fixed tree: vector width, row tile and schedule change nothing. (tiles/ has products of its own,
// for prefill only.)
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/normalise.hpp"
#include "keyfold/tensor.hpp"

namespace keyfold::cpu {

inline constexpr std::int64_t kSplitLen = 512;   ///< keys per split
inline constexpr std::int64_t kPanel = 64;       ///< keys packed, and hidden by masks, together
inline constexpr std::int64_t kMaxDim = 576;     ///< largest head_dim and value_dim
inline constexpr std::int64_t kMaxRowTile = 48;  ///< query rows of a tile, at most
inline constexpr std::int64_t kDirectRows = 8;   ///< likewise where keys are read from their rows
inline constexpr std::int64_t kDecodeLen = 8;    ///< largest q_len of a decode call
/// Floats from one row of scores to the next: rows a power of two apart would share sets of L1.
inline constexpr std::int64_t kScoreStride = kSplitLen + 16;
/// A panel of a split each, from bit 0 on.
using Panels = std::uint8_t;
static_assert(kSplitLen / kPanel == 8);

/// Rows of a tensor: row i, element d at data + i * row_stride + d * dim_stride (bytes).
struct RowSource {
  const std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t row_stride = 0;
  std::int64_t dim_stride = 0;
  std::int64_t dim = 0;
};

/// One split's result for a few rows, or the running state of rows: output o of `dim` floats a row
/// (padded to a multiple of 16), maximum score m and sum l.
struct RowState {
  float* o = nullptr;
  float* m = nullptr;
  float* l = nullptr;
};

/// What a mask does to a few keys of a row.
enum class Seen : std::uint8_t {
  kNothing,  ///< hides all
  kBiased,   ///< hides some, or adds to their scores
  kWhole,    ///< nothing
};

/// A tile: up to row_tile query rows (kDirectRows where keys are read from their rows) against one
/// split. Keys are numbered within the split. Scores, weights and values of panels that no row sees
/// are neither written nor read.
struct Tile {
  std::int64_t num_rows = 0;
  const void* q = nullptr;  ///< packed rows of `words` words each, kMaxDim words apart
  std::int64_t words = 0;   ///< see Kernels::words
  std::int64_t padded_value_dim = 0;
  float scale = 1;
  float softcap = 0;                     ///< 0: none
  std::int32_t begin[kMaxRowTile] = {};  ///< keys that each row may see, in panels it sees
  std::int32_t end[kMaxRowTile] = {};
  Panels seen[kMaxRowTile] = {};        ///< panels of which it sees a key
  Panels biased[kMaxRowTile] = {};      ///< of these, panels that have biases
  const float* bias[kMaxRowTile] = {};  ///< [kSplitLen], added to its scores
  Panels panels = 0;                    ///< seen by any row
  std::int64_t first = kSplitLen;       ///< no row sees a key before this one
  std::int64_t last = 0;                ///< or from this one on
  float* scores = nullptr;              ///< [num_rows][kScoreStride]: first scores, then weights

  /// Sets what row r sees, but for its biases: of keys [from, to) those in panels `which`. Once for
  /// each row.
  void see(std::int64_t r, std::int64_t from, std::int64_t to, Panels which) {
    seen[r] = which;
    panels |= which;
    if (which == 0) return;
    from = std::max<std::int64_t>(from, std::countr_zero(which) * kPanel);
    to = std::min<std::int64_t>(to, std::bit_width(which) * kPanel);
    begin[r] = static_cast<std::int32_t>(from);
    end[r] = static_cast<std::int32_t>(to);
    first = std::min(first, from);
    last = std::max(last, to);
  }
};

/// The panels that hold keys [begin, end).
inline Panels panels_of(std::int64_t begin, std::int64_t end) {
  if (begin >= end) return 0;
  return static_cast<Panels>((2 << (end - 1) / kPanel) - (1 << begin / kPanel));
}

/// A tile is reduced by score() over its panels, softmax(), and weigh() over its values; all three
/// may be called part by part in ascending order, and touch only keys of [first, last).
struct Kernels {
  const char* name;        ///< "avx512", ...
  std::int64_t row_tile;   ///< query rows per tile, at most
  std::int64_t row_align;  ///< a tile's rows are computed in multiples of these

  /// 32-bit words that a packed row of q or k takes: one per element, or one per bfloat16 pair
  /// where the instruction set multiplies pairs.
  std::int64_t (*words)(DType dtype, std::int64_t head_dim);
  /// As score() and weigh(), straight from the rows of k and v, for up to kDirectRows query rows;
  /// the first row is that of key `begin`, a multiple of kPanel, and rows up to `end` may be read.
  /// Null on tiles, whose keys and values must be packed.
  void (*score_rows)(const Tile& tile, const RowSource& k, std::int64_t begin, std::int64_t end);
  void (*weigh_rows)(const Tile& tile, const RowSource& v, std::int64_t begin, std::int64_t end,
                     const RowState& result);
  /// The mask's row of a few keys (kPanel at most) as biases: 0 or -inf from a boolean mask, the
  /// value itself from an additive one. Writes them only if it returns kBiased.
  Seen (*gather_bias)(const RowSource& mask, float* bias);
  /// Packs one query row.
  void (*pack_q)(const RowSource& q, void* packed);
  /// Packs keys [0, count) into a panel of `words` x kPanel words, zeros behind as far as score()
  /// multiplies for keys before `count`. count <= kPanel.
  void (*pack_k)(const RowSource& k, std::int64_t count, void* packed_panel);
  /// Packs `count` values into a panel of padded_dim x kPanel floats. Likewise.
  void (*pack_v)(const RowSource& v, std::int64_t count, std::int64_t padded_dim,
                 float* packed_panel);

  /// Products of the tile's queries with keys [begin, end), multiples of kPanel, which `panels`
  /// holds.
  void (*score)(const Tile& tile, DType dtype, const void* panels, std::int64_t begin,
                std::int64_t end);
  /// Scores become weights exp(score - m), 0 where hidden; result gets m and l.
  void (*softmax)(const Tile& tile, const RowState& result);
  /// o (+)= weights times values of keys [begin, end), multiples of kPanel, which `v` holds.
  void (*weigh)(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                const RowState& result);
  /// As weigh(), but keys of weight 0 (hidden ones among them) are passed over, as 0 times Inf or
  /// NaN would leak their values. The same bits where all values are finite.
  void (*weigh_exactly)(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                        const RowState& result);
  /// Whether the tile's outputs hold neither Inf nor NaN.
  bool (*all_finite)(const Tile& tile, const RowState& result);

  /// Merges rows' later states into their earlier ones.
  void (*merge)(const RowState& states, const RowState& laters, std::int64_t padded_dim,
                std::int64_t rows);
  /// Normalises a row's output and stores it in the dtype, its elements `step` bytes apart.
  void (*finish_row)(const core::RowEnd& end, const float* o, std::int64_t dim, DType dtype,
                     std::byte* out, std::int64_t step);
  /// The exponential that all of the above use: within 2 ulp for x from -87.33 to 0, 0 below.
  void (*exp)(const float* x, float* result, std::int64_t count);
};

/// Names of the kernels that this machine can run, best first.
std::vector<std::string> kernel_names();

/// The best kernels for a call's dtype and q_len, or those that KEYFOLD_CPU_ISA names; throws
/// InvalidArgument if it names others than kernel_names(). For tests it may also name
/// "amx_emulated". Tiles, where there are, take the prefill of 16-bit dtypes. Nothing but dtype and
/// q_len decides: what shares a chunk, a block or a tile with a row may not change its bits.
const Kernels& selected_kernels(DType dtype = DType::kFloat32, std::int64_t q_len = 1);

/// Whether these give a row the same bits in decode and in prefill.
bool decode_as_prefill();

}  // namespace keyfold::cpu

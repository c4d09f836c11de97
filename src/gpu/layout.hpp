// The memory of a run, laid out once: its size depends on the rows, never on the number of keys.
#pragma once

#include <algorithm>

#include "core/backend.hpp"

namespace keyfold::gpu {

inline constexpr std::int64_t kBusyTiles = 512;     ///< workgroups that keep a large device busy
inline constexpr std::int64_t kDecodeTiles = 4096;  ///< workgroups of one wave of short kernels
inline constexpr std::int64_t kMaxPartials = 32 << 20;  ///< bytes of partial states, about
inline constexpr std::int64_t kFrames = 2;              ///< submissions in flight
inline constexpr std::int64_t kMinWindow = 1 << 20, kMaxWindow = 32 << 20;
inline constexpr std::int64_t kMaxPiece = 4 << 20;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

/// How the kernel that meets the keys divides its work.
struct Tiling {
  std::int64_t split_len = 0;
  std::int64_t tile_rows = 0;  ///< row indices of a workgroup
  bool decode = false;         ///< short kernels, which give partial states only
  bool folds = false;      ///< it goes on from the state, split after split: never partial states
  std::int64_t units = 1;  ///< parts of a split with partial states of their own
  std::int64_t flag_rows = 0;  ///< row indices that share a flag of the kernel's; 0 without flags
  /// Tiles that are cut along the keys: bytes that they leave at the cuts, where there are more
  /// tiles than this.
  std::int64_t cut_bytes = 0, uncut_tiles = 0;
  /// What is prepared of a split first: bytes of a group's, and of each row besides; 0 where
  /// nothing is. `shared`: all groups use the same.
  std::int64_t split_bytes = 0, split_row_bytes = 0;
  std::int64_t split_flag_bytes = 0;  ///< and behind all that, of each flag's rows of each group
  std::int64_t prepared_head = 0;     ///< bytes in front of that
  std::int64_t most_prepared = 0;     ///< bytes of all that, about
  bool shared = false;
};

/// Sizes in bytes, for a block of `groups` x `rows`.
struct Layout {
  const core::Problem& problem;
  Tiling tiling;
  bool shared_memory;  ///< the host writes the device's memory

  std::int64_t element() const { return size_of(problem.shape.dtype); }
  std::int64_t k_pitch() const { return round_up(problem.shape.head_dim * element(), 16); }
  std::int64_t v_pitch() const { return round_up(problem.shape.value_dim * element(), 16); }
  std::int64_t padded_head_dim() const { return k_pitch() / element(); }
  std::int64_t padded_value_dim() const { return v_pitch() / element(); }
  std::int64_t split_len() const { return tiling.split_len; }

  std::int64_t states(std::int64_t groups, std::int64_t rows) const {
    return groups * rows * problem.group_size();
  }
  std::int64_t q(std::int64_t states) const { return states * k_pitch(); }
  std::int64_t o(std::int64_t states) const { return states * padded_value_dim() * 4; }
  std::int64_t ml(std::int64_t states) const { return states * 8; }
  /// Partial states that wait to be merged: at least one split of one group.
  std::int64_t partial_rows(std::int64_t rows) const {
    if (tiling.folds) return 0;
    const std::int64_t indices = rows * problem.group_size();
    const std::int64_t tiles = tiling.decode ? kDecodeTiles * tiling.units : kBusyTiles;
    return std::max(tiling.units * indices, std::min(tiles * std::min(indices, tiling.tile_rows),
                                                     kMaxPartials / (padded_value_dim() * 4)));
  }
  /// The flags, 32 bits each.
  std::int64_t flags(std::int64_t groups, std::int64_t rows) const {
    if (tiling.flag_rows == 0) return 0;
    const std::int64_t tile = tiling.tile_rows, indices = rows * problem.group_size();
    // Tiles of a wave, which may be cut down to the rows of a flag; of partial states, at most:
    // where the last of a group's is not full, too.
    const std::int64_t tiles = tiling.folds
                                   ? groups * ceil_div(indices, tiling.flag_rows)
                                   : std::max(kDecodeTiles, 2 * ceil_div(partial_rows(rows), tile));
    return 4 * tiles * (tile / tiling.flag_rows);
  }
  std::int64_t cuts(std::int64_t groups, std::int64_t rows) const {
    const std::int64_t tiles = groups * ceil_div(rows * problem.group_size(), tiling.tile_rows);
    return tiles > tiling.uncut_tiles ? tiling.cut_bytes : 0;
  }
  std::int64_t prepared_bytes(std::int64_t groups, std::int64_t rows) const {
    std::int64_t bytes = tiling.split_bytes + rows * tiling.split_row_bytes;
    if (tiling.split_flag_bytes != 0) {
      const std::int64_t tiles = ceil_div(rows * problem.group_size(), tiling.flag_rows);
      bytes += tiling.split_flag_bytes * tiles * (tiling.shared ? groups : 1);
    }
    return bytes;
  }
  /// Splits of a group (of all, where they share them) that a wave can have prepared; 0 where
  /// nothing is.
  std::int64_t prepared_splits(std::int64_t groups, std::int64_t rows) const {
    const std::int64_t split = prepared_bytes(groups, rows);
    if (split == 0) return 0;
    const std::int64_t likely = 8 * o(states(groups, rows));
    const std::int64_t bytes = std::clamp(likely, 4 * kMinWindow, tiling.most_prepared);
    return std::max<std::int64_t>(1, bytes / split);
  }
  std::int64_t prepared(std::int64_t groups, std::int64_t rows) const {
    return tiling.prepared_head + prepared_splits(groups, rows) * prepared_bytes(groups, rows);
  }
  /// Where what is of flags' rows begins in it.
  std::int64_t prepared_flags(std::int64_t groups, std::int64_t rows) const {
    return tiling.prepared_head +
           prepared_splits(groups, rows) * (tiling.split_bytes + rows * tiling.split_row_bytes);
  }
  /// Whether a chunk of these keys, of the whole block, is one wave as far as that goes.
  bool prepared_at_once(std::int64_t groups, std::int64_t rows, std::int64_t keys) const {
    const std::int64_t sets = tiling.shared ? 1 : groups;
    return prepared_bytes(groups, rows) == 0 ||
           sets * ceil_div(keys, split_len()) <= prepared_splits(groups, rows);
  }
  /// Keys and values of a window that every group of a chunk needs.
  std::int64_t key_bytes(std::int64_t groups) const { return groups * (k_pitch() + v_pitch()); }
  /// One of the two windows into which host keys are copied.
  std::int64_t window(std::int64_t groups, std::int64_t rows) const {
    // In proportion to the work on it; where that is little, copies cost most when they are small.
    const std::int64_t likely = 2 * o(states(groups, rows));
    const std::int64_t least = tiling.decode ? 4 * kMinWindow : kMinWindow;
    return std::max(key_bytes(groups) * split_len(), std::clamp(likely, least, kMaxWindow));
  }
  /// All of these: none where no key is on the host.
  std::int64_t windows(std::int64_t groups, std::int64_t rows) const {
    return problem.keys_on_device ? 0 : kFrames * window(groups, rows);
  }
  /// Where keys that are on the device, but not as kernels read them, are gathered: of some groups
  /// at a time.
  std::int64_t gathered(std::int64_t groups, std::int64_t rows) const {
    const std::int64_t least = key_bytes(1) * split_len();
    return std::clamp(window(groups, rows), least, std::max(least, kMaxWindow));
  }
  /// The state: o, then ml.
  std::int64_t state(std::int64_t states) const { return o(states) + ml(states); }
  /// A piece of it on its way to or from the host; there are two.
  std::int64_t piece(std::int64_t states) const {
    return std::min(kMaxPiece, round_up(state(states), 16));
  }
  /// Mask bytes of one key, of all the rows and heads of a block.
  std::int64_t mask_key_bytes(std::int64_t groups, std::int64_t rows) const {
    if (!problem.mask) return 0;
    const Dims& strides = problem.mask->strides;
    const std::int64_t batches =
        strides[0] == 0
            ? 1
            : std::min(problem.shape.batch, ceil_div(groups, problem.shape.num_kv_heads) + 1);
    const std::int64_t heads = strides[1] == 0 ? 1
                               : groups == 1   ? problem.group_size()
                                               : problem.shape.num_heads;
    return batches * heads * (strides[2] == 0 ? 1 : rows) * size_of(problem.mask->dtype);
  }
  std::int64_t mask(std::int64_t groups, std::int64_t rows) const {
    if (!problem.mask) return 0;
    const std::int64_t split = split_len() * mask_key_bytes(groups, rows);
    return std::max(split, std::min<std::int64_t>(8 * split, 4 * kMinWindow));
  }
  /// Keys of a chunk that both a window and its mask hold, in whole splits.
  std::int64_t max_keys(std::int64_t groups, std::int64_t rows) const {
    std::int64_t keys = window(groups, rows) / key_bytes(groups);
    if (problem.mask) keys = std::min(keys, mask(groups, rows) / mask_key_bytes(groups, rows));
    return keys / split_len() * split_len();
  }
  std::int64_t total(std::int64_t groups, std::int64_t rows) const {
    const std::int64_t n = states(groups, rows), p = partial_rows(rows);
    const std::int64_t copies = shared_memory ? 1 : 2;  // on the host's side and on the device's
    return copies * (q(n) + windows(groups, rows) + kFrames * mask(groups, rows)) + o(n) +
           2 * ml(n) + o(p) + ml(p) + 2 * piece(n) + flags(groups, rows) + prepared(groups, rows) +
           cuts(groups, rows);
  }
};

}  // namespace keyfold::gpu

// How the kernels on CUDA cores are shaped: what kernels/*.cu are compiled for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "keyfold/tensor.hpp"

namespace keyfold::cuda {

/// What a shape depends on. Nothing of the device enters: shapes decide the order of sums, and so
/// the bits of results.
struct ShapeQuery {
  DType dtype = DType::kFloat32;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
};

inline constexpr std::int64_t kMaxHeadDim = 576;  ///< and of value_dim
inline constexpr std::uint32_t kWarp = 32;
/// Shared memory of a block that every supported device has.
inline constexpr std::uint32_t kMaxSharedBytes = 64 << 10;

/// Keys of a split of each kernel: constants, as bits depend on them.
inline constexpr std::uint32_t kPrefillSplitLen = 1024;
inline constexpr std::uint32_t kDecodeSplitLen = 512;
inline constexpr std::uint32_t kDecodeMmaSplitLen = 4096, kDecodeMmaUnitLen = 512;
inline constexpr std::uint32_t kDecodeMergeThreads = 256;  ///< at most; eight take a split

/// kernels/attend.cu. A block is `ty` x `tx` threads of `tr` rows x `tc` keys.
struct AttendShape {
  std::uint32_t ty = 0, tx = 0, tr = 0, tc = 0;
  std::uint32_t groups = 0;       ///< of four columns of the output in a thread
  std::uint32_t slice_words = 0;  ///< 16-byte words of a row of q and k in shared memory
  std::uint32_t slice_keys = 0;   ///< rows of v in shared memory
  std::uint32_t shared_bytes = 0;

  std::uint32_t threads() const { return ty * tx; }
  std::uint32_t rows() const { return ty * tr; }  ///< of a block
  std::uint32_t keys() const { return tx * tc; }  ///< of a tile
};

/// kernels/wgmma.cu. A block has `warpgroups` of 64 rows, and one more that copies for them.
struct WgmmaShape {
  std::uint32_t warpgroups = 0;
  std::uint32_t keys = 0;  ///< of a tile
  /// K and V of a tile come in parts: some panels of 64 columns of K, some keys of V.
  std::uint32_t part_panels = 0, part_keys = 0;
  std::uint32_t slots = 0;                       ///< for parts
  std::uint32_t mark_slots = 0;                  ///< for a tile's bits of a mask
  std::uint32_t bias_slots = 0, bias_parts = 1;  ///< for a tile's values of a mask, in parts
  std::uint32_t weighings = 0;  ///< steps in which scores become weights and meet V
  std::uint32_t shared_bytes = 0;

  std::uint32_t threads() const { return 128 * (warpgroups + 1); }
  std::uint32_t rows() const { return 64 * warpgroups; }
  /// Where chunks may end, and sums of weights are closed.
  std::uint32_t split_len() const { return partial_len != 0 ? partial_len : 8 * keys; }
  /// Length of the splits that are reduced each on its own, so that few rows keep a large device
  /// busy; 0: the kernel folds split after split.
  std::uint32_t partial_len = 0;
  std::uint32_t value_panels = 0;  ///< of 64 columns

  /// Flags of so many blocks, and what each leaves at a cut: 256 bytes a row and panel, and 32 a
  /// thread.
  std::int64_t flag_bytes(std::uint32_t blocks) const {
    return (std::int64_t{4} * blocks * warpgroups + 255) / 256 * 256;
  }
  std::int64_t cut_bytes(std::uint32_t blocks) const {
    return flag_bytes(blocks) +
           std::int64_t{blocks} * warpgroups * (64 * 256 * value_panels + 4096);
  }
};

/// kernels/mma.cu. A block has `row_warps` x `column_warps` warps of `blocks` of 16 rows. Results
/// depend on `keys` and the column warps, which only the dtype and the dims decide; how much of a
/// tile fits into shared memory decides the rest.
struct MmaShape {
  std::uint32_t blocks = 0;
  std::uint32_t row_warps = 0;
  std::uint32_t column_warps = 0;  ///< parts of the output's columns
  std::uint32_t keys = 0;          ///< of a tile
  std::uint32_t stages = 0;        ///< tiles of keys in shared memory
  std::uint32_t resident = 0;      ///< blocks that share a multiprocessor
  std::uint32_t shared_bytes = 0;

  std::uint32_t threads() const { return kWarp * row_warps * column_warps; }
  std::uint32_t rows() const { return 16 * blocks * row_warps; }
  /// Where chunks may end, and sums of weights are closed.
  std::uint32_t split_len() const { return 8 * keys; }
};

/// kernels/mask_bits.cu: a warp takes records, of a row's split each, in turn with others.
struct MaskBits {
  static constexpr std::uint32_t kThreads = 256, kMostBlocks = 528;
  static constexpr std::uint32_t kRecordsFrom = 4 * kMostBlocks;  ///< bytes of words of the blocks
  static constexpr std::int64_t kMostBytes = 24 << 20;            ///< of records, about
  static std::uint32_t record_bytes(std::uint32_t split_len) {
    return (split_len / 8 + 15) / 16 * 16 + 16;
  }
  /// Of what mask_jobs.cu finds of a job's split, and of the job.
  static constexpr std::int64_t kSumBytes = 16 + 4;
};

/// kernels/wgmma3.cu, in the same way, and pairs.cu.
struct Wgmma3Shape {
  static constexpr std::uint32_t kPairsThreads = 256;
  static constexpr std::int64_t kMostPrepared = 64 << 20;  ///< bytes of pairs, about
  /// Rows of a group up to which splits go side by side, so that few rows keep a large device busy.
  static constexpr std::int64_t kFewRows = 1024;

  std::uint32_t warpgroups = 0;
  std::uint32_t keys = 0;    ///< of a tile
  std::uint32_t stages = 0;  ///< of K and V in turn
  std::uint32_t shared_bytes = 0;
  std::uint32_t tile_bytes = 0;  ///< of K and V as pairs

  std::uint32_t threads() const { return 128 * (warpgroups + 1); }
  std::uint32_t rows() const { return 64 * warpgroups; }
};

/// kernels/decode.cu. `row_limit` is the most rows of a block; fewer give the same bits.
struct DecodeShape {
  std::uint32_t warps = 0;
  std::uint32_t row_limit = 0;  ///< a power of two
  std::uint32_t head_lanes = 0, value_lanes = 0;

  std::uint32_t threads() const { return warps * kWarp; }
  /// Rows of a block for a call with `num_indices` rows of a group: a power of two.
  std::uint32_t rows(std::int64_t num_indices) const;
};

/// kernels/decode_mma.cu: `streams` of `row_team` x `column_team` warps, each with a ring of
/// `slots` steps of keys. Results depend on `step` and `streams`, which the dims alone decide.
struct DecodeMmaShape {
  std::uint32_t step = 0;  ///< keys
  std::uint32_t streams = 0;
  std::uint32_t row_team = 0, column_team = 0;
  std::uint32_t slots = 0;
  std::uint32_t resident = 0;   ///< blocks that share a multiprocessor
  std::uint32_t tile_rows = 0;  ///< that are in use, in eights
  std::uint32_t levels = 0;     ///< of the tree of units, of which a left half can wait in a block
  std::uint32_t shared_bytes = 0;

  std::uint32_t warps() const { return streams * row_team * column_team; }
  std::uint32_t threads() const { return kWarp * warps(); }
  std::uint32_t rows() const { return 16 * row_team; }
};

/// kernels/decode_cluster.cu: a warp for each of a leaf's `steps`. A block has `leaves` at most;
/// parts of these, K or V, come through `slots`. Results depend on what they depend on in
/// decode_mma.cu.
struct DecodeClusterShape {
  std::uint32_t steps = 0, leaves = 0, slots = 0, tile_rows = 0;
  std::uint32_t resident = 0;                     ///< blocks that fit onto a multiprocessor
  std::uint32_t fixed_bytes = 0, part_bytes = 0;  ///< of shared memory

  std::uint32_t threads() const { return kWarp * steps; }
  std::uint32_t shared_bytes(std::uint32_t leaves_of_block) const {
    return fixed_bytes + std::min(slots, 2 * leaves_of_block) * part_bytes;
  }
  /// Of the cluster of a group with so many leaves: as many as the group's share of the
  /// multiprocessors. nullopt where decode_mma.cu is faster.
  std::optional<std::uint32_t> blocks(std::uint32_t leaves_of_group, std::uint32_t share) const;
};

/// kernels/merge.cu.
struct MergeShape {
  std::uint32_t rows = 0;   ///< of a block
  std::uint32_t lanes = 0;  ///< threads of a row
  std::uint32_t ahead = 0;  ///< partial states that are loaded together

  std::uint32_t threads() const { return rows * lanes; }
};

/// For `num_rows` rows of a group, of which the device takes `most_tiles` tiles at once. nullopt
/// for float32, and where registers or shared memory are too few. `masked`: rows have masks.
/// Neither that nor `most_tiles` changes a bit.
std::optional<WgmmaShape> wgmma_shape(const ShapeQuery& query, std::int64_t num_rows, bool masked,
                                      std::int64_t most_tiles);
/// The same with room for a mask's values, of so many bytes each, in place of bits: `rows` of a
/// tile. nullopt where there is none.
std::optional<WgmmaShape> with_biases(const ShapeQuery& query, WgmmaShape shape, std::uint32_t size,
                                      std::uint32_t rows);
/// nullopt for all but float32, and where registers or shared memory are too few.
std::optional<Wgmma3Shape> wgmma3_shape(const ShapeQuery& query);
/// nullopt where `max_shared_bytes`, of a block, do not suffice. `masked`: rows have masks.
std::optional<MmaShape> mma_shape(const ShapeQuery& query, bool masked,
                                  std::uint32_t max_shared_bytes);
AttendShape attend_shape(const ShapeQuery& query);
DecodeShape decode_shape(const ShapeQuery& query);
/// For `num_indices` rows of a group. nullopt for float32, and as mma_shape().
std::optional<DecodeMmaShape> decode_mma_shape(const ShapeQuery& query, std::int64_t num_indices,
                                               std::uint32_t max_shared_bytes);
/// For the same calls; nullopt where a block has no room for them, or for their rows.
std::optional<DecodeClusterShape> decode_cluster_shape(const ShapeQuery& query,
                                                       const DecodeMmaShape& as,
                                                       std::uint32_t max_shared_bytes);
/// `many`: splits of a few rows, rather than few splits of many.
MergeShape merge_shape(const ShapeQuery& query, bool many);

}  // namespace keyfold::cuda

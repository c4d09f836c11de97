// Masks as bits: mask_bits.cu makes them of a wave's part, for wgmma.cu. A bit says whether the row
// sees the key. A mask that is broadcast over heads, batch entries or rows has their bits once:
//   [blocks] words: whether a block has met other values than 0 and -Inf
//   [planes][rows][splits of the wave] records, from kRecordsFrom on: kSplitLen bits, and of each
//   tile of kKeys keys whether any is seen (64 bits), and whether all are (64 bits)
#pragma once

#include "common.cuh"

constexpr u32 kKeys = KEYFOLD_KEYS;                               // of a tile
constexpr u32 kMostBlocks = 528, kRecordsFrom = 4 * kMostBlocks;  // kernel_shape.hpp has these, too
constexpr u32 kOfTilesAt = (kSplitLen / 8 + 15) / 16 * 16, kRecordBytes = kOfTilesAt + 16;
constexpr i32 kSplitTiles = kSplitLen / kKeys;
static_assert(kSplitLen % kKeys == 0 && kKeys % 32 == 0 && kSplitTiles <= 64, "the record");

KEYFOLD_INLINE u32 ones(u32 count) { return count >= 32 ? ~0u : (1u << count) - 1; }

KEYFOLD_INLINE u32 mask_rows(const Params& p) {
  return p.mask_row != 0 ? (p.index_end - 1) / p.heads - p.index_begin / p.heads + 1 : 1;
}
// The number of the first record of a row. `group` is absolute.
KEYFOLD_INLINE u64 first_record(const Params& p, u32 group, u32 index) {
  const u32 plane = p.mask_head != 0    ? (group - p.group) * p.heads + index % p.heads
                    : p.mask_batch != 0 ? group / p.kv_heads - p.group / p.kv_heads
                                        : 0;
  const u32 row = p.mask_row != 0 ? index / p.heads - p.index_begin / p.heads : 0;
  return (u64(plane) * mask_rows(p) + row) * p.num_splits;
}

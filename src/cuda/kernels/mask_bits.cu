// Makes bits of a wave's part of a mask: a warp for each record. See mask_bits.cuh.
#include "mask_bits.cuh"

struct Jobs {
  u64 redo;
  u32 groups, tiles, small, units;  // groups: of the wave
  u64 bits;
};

constexpr u32 kSize = kMaskType == 1 ? 1 : kMaskType == 2 ? 4 : 2;
constexpr u32 kTileWords = kKeys / 32;

// The bits of the masks in a word of memory.
KEYFOLD_INLINE u32 shown_of(u32 x, bool& other) {
  if constexpr (kMaskType == 1) {
    const u32 set = (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7 & 0x01010101u;
    return set * 0x01020408u >> 24;
  }
  if constexpr (kMaskType == 2) {
    const float bias = __uint_as_float(x);
    other = other || (bias != 0.0f && bias != hidden());
    return bias != hidden() ? 1 : 0;
  }
  constexpr u32 kHidden = kMaskType == 3 ? 0xfc00u : 0xff80u;
  const u32 low = x & 0xffffu, high = x >> 16;
  const auto is_other = [](u32 bits) { return (bits & 0x7fffu) != 0 && bits != kHidden; };
  other = other || is_other(low) || is_other(high);
  return (low != kHidden ? 1 : 0) | (high != kHidden ? 2 : 0);
}
// The bits of up to 32 keys; `aligned`: the masks of 32 are words of 16 bytes.
KEYFOLD_INLINE u32 bits_of_keys(const Params& p, u64 mask, i32 count, bool aligned, bool& other) {
  u32 bits = 0;
  if (aligned && count == 32) {
    uint4 words[2 * kSize];
#pragma unroll
    for (u32 i = 0; i < 2 * kSize; ++i) words[i] = load_words(mask + 16 * i);
#pragma unroll
    for (u32 i = 0; i < 2 * kSize; ++i) {
      const u32 of[4] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
      for (u32 j = 0; j < 4; ++j) bits |= shown_of(of[j], other) << 4 / kSize * (4 * i + j);
    }
    return bits;
  }
  for (i32 i = 0; i < count; ++i) {
    const float bias = mask_value(mask + i64(i) * p.mask_key);
    other = other || (bias != 0.0f && bias != hidden());
    bits |= (bias != hidden() ? 1u : 0u) << i;
  }
  return bits;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    mask_bits(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  constexpr u32 kWarps = kThreads / 32;
  const u32 lane = threadIdx.x % 32, rows = mask_rows(p);
  const u32 first_batch = p.group / p.kv_heads;
  const u32 last_batch = (p.group + jobs.groups - 1) / p.kv_heads;
  const bool by_head = p.mask_head != 0;
  const u32 planes = by_head             ? jobs.groups * p.heads
                     : p.mask_batch != 0 ? last_batch - first_batch + 1
                                         : 1;
  const bool aligned =
      (p.mask | u64(p.mask_row | p.mask_head | p.mask_batch)) % 16 == 0 && p.mask_key == kSize;
  bool other = false;
  for (u32 n = blockIdx.x * kWarps + threadIdx.x / 32; n < planes * rows * p.num_splits;
       n += gridDim.x * kWarps) {
    const u32 split = n % p.num_splits, plane = n / p.num_splits / rows;
    const u32 row = p.index_begin / p.heads + n / p.num_splits % rows;
    // A group and an index that have the plane.
    const u32 group = by_head ? p.group + plane / p.heads : (first_batch + plane) * p.kv_heads;
    const u32 index = row * p.heads + (by_head ? plane % p.heads : 0);
    const u64 mask = mask_address(p, group / p.kv_heads, group, index);
    const u64 record = jobs.bits + kRecordsFrom + u64(n) * kRecordBytes;
    const i32 first = i32((p.split + split) * kSplitLen);
    const bool alike = p.batches == 0 && p.mask_row != 0;
    Range seen = alike ? visible(p.alike, row) : Range{0, i32(p.num_keys)};
    for (u32 i = lane; i < kSplitLen / 32; i += 32) {
      // What the row does not see anyway is not read.
      const i32 key = first + i32(32 * i);
      const i32 begin = clamped(seen.begin - key, 0, 32), end = clamped(seen.end - key, begin, 32);
      u32 bits = 0;
      if (begin < end) {
        bits = bits_of_keys(p, mask + i64(key) * p.mask_key, smaller(32, i32(p.num_keys) - key),
                            aligned, other);
        bits &= ones(u32(end)) & ~ones(u32(begin));
      }
      write_word(record + 4 * i, bits);
    }
    __syncwarp();
    bool any[2] = {false, false}, all[2] = {false, false};
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 tile = 32 * i + lane;
      if (tile >= u32(kSplitTiles)) continue;
      u32 some = 0, every = ~0u;
#pragma unroll
      for (u32 j = 0; j < kTileWords; ++j) {
        const u32 bits = read_word(record + 4 * (tile * kTileWords + j));
        some |= bits, every &= bits;
      }
      any[i] = some != 0, all[i] = every == ~0u;
    }
    const u32 words[4] = {__ballot_sync(~0u, any[0]), __ballot_sync(~0u, any[1]),
                          __ballot_sync(~0u, all[0]), __ballot_sync(~0u, all[1])};
    if (lane < 4) write_word(record + kOfTilesAt + 4 * lane, words[lane]);
  }
  other = __syncthreads_or(other);
  if (threadIdx.x == 0) write_word(jobs.bits + 4 * blockIdx.x, other ? 1 : 0);
}

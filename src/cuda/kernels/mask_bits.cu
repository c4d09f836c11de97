// Makes bits of a wave's part of a mask: a warp for each record. See mask_bits.cuh.
#include "mask_bits.cuh"

struct Jobs {
  u64 redo;
  u32 groups, tiles, small, units;  // groups: of the wave
  u64 bits;
};

KEYFOLD_INLINE void write_word(u64 address, u32 x) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}

// As mask_value(), of a mask whose elements are aligned.
KEYFOLD_INLINE float aligned_mask_value(u64 address) {
  if constexpr (kMaskType == 2) return load_float(address);
  unsigned short bits;
  if constexpr (kMaskType == 1) {
    asm("ld.global.nc.u8 %0, [%1];" : "=h"(bits) : "l"(address));
    return bits != 0 ? 0.0f : hidden();
  }
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(address));
  return kMaskType == 3 ? float16_value(bits) : __uint_as_float(u32(bits) << 16);
}

// A row's keys of a split, those that it sees before the mask; what others hold is not read.
// Whether there are other values than 0 and -Inf.
template <bool kAligned>
KEYFOLD_INLINE bool make_record(const Params& p, u64 mask, i32 first, Range seen, u64 record,
                                u32 lane) {
  constexpr u32 kWords = kSplitLen / 32;
  constexpr u32 kAtOnce = kWords % 16 == 0 ? 16 : kWords % 14 == 0 ? 14 : 12;
  static_assert(kWords % kAtOnce == 0);
  bool other = false;
  for (u32 begin = 0; begin < kWords; begin += kAtOnce) {
    float bias[kAtOnce];
    u32 word = 0;
#pragma unroll
    for (u32 i = 0; i < kAtOnce; ++i) {
      const i32 key = clamped(first + i32(32 * (begin + i) + lane), seen.begin, seen.end - 1);
      const u64 at = mask + i64(key) * p.mask_key;
      bias[i] = kAligned ? aligned_mask_value(at) : mask_value(at);
    }
#pragma unroll
    for (u32 i = 0; i < kAtOnce; ++i) {
      const i32 key = first + i32(32 * (begin + i) + lane);
      const bool shown = key >= seen.begin && key < seen.end && bias[i] != hidden();
      other = other || (shown && bias[i] != 0.0f);
      const u32 bits = __ballot_sync(~0u, shown);
      if (lane == i) word = bits;
    }
    if (lane < kAtOnce) write_word(record + 4 * (begin + lane), word);
  }
  return other;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    mask_bits(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  constexpr u32 kSize = kMaskType == 1 ? 1 : kMaskType == 2 ? 4 : 2, kWarps = kThreads / 32;
  const u32 lane = threadIdx.x % 32, rows = mask_rows(p);
  const u32 first_batch = p.group / p.kv_heads;
  const u32 last_batch = (p.group + jobs.groups - 1) / p.kv_heads;
  const bool by_head = p.mask_head != 0;
  const u32 planes = by_head             ? jobs.groups * p.heads
                     : p.mask_batch != 0 ? last_batch - first_batch + 1
                                         : 1;
  const bool aligned =
      (p.mask | u64(p.mask_key | p.mask_row | p.mask_head | p.mask_batch)) % kSize == 0;
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
    seen = {larger(seen.begin, first), smaller(seen.end, first + i32(kSplitLen))};
    if (seen.begin >= seen.end) {
      for (u32 i = lane; i < kSplitLen / 32; i += 32) write_word(record + 4 * i, 0);
    } else if (aligned) {
      other = make_record<true>(p, mask, first, seen, record, lane) || other;
    } else {
      other = make_record<false>(p, mask, first, seen, record, lane) || other;
    }
  }
  other = __syncthreads_or(other);
  if (threadIdx.x == 0) write_word(jobs.bits + 4 * blockIdx.x, other ? 1 : 0);
}

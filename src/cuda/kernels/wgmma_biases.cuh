// Biases: a mask's values, which the copy engine brings into shared memory, tile after tile, in
// parts that take turns in a ring of slots of their own. Where the heads of a group have the same
// mask, a tile has each of its rows once. Rows lie as panels of 128 bytes, swizzled by 128 bytes.
#pragma once

#include "wgmma_marks.cuh"

constexpr bool kBiased = kBiasSlots != 0;
using BiasRing = RingOf<kBiased ? kBiasSlots : 1>;

// A row of the job among the rows of a part.
KEYFOLD_INLINE u32 bias_row(const Params& p, const Job& job, u32 index) {
  const u32 row = p.mask_row != 0 ? index / p.heads - job.first / p.heads : 0;
  return p.mask_head != 0 ? row * p.heads + index % p.heads : row;
}
// Where in a panel a lane's first two values of a row are.
KEYFOLD_INLINE u32 bias_place(u32 row, u32 lane) {
  const u32 at = kBiasSize * 2 * (lane % 4);
  return 128 * row + (at ^ row % 8 * 16);
}

// The side that copies: a tile's parts.
KEYFOLD_INLINE void copy_biases(const Job& job, i32 n, const TensorMap& map, const Params& p,
                                u32 base, const Barriers& bars, BiasRing& ring) {
  const u32 head = p.mask_head != 0 ? job.group % p.kv_heads * p.heads : 0;
  const u32 row = p.mask_row != 0 ? job.first / p.heads : 0;
  const u32 batch = p.mask_batch != 0 ? job.group / p.kv_heads : 0;
  for (u32 part = 0; part < kBiasParts; ++part) {
    const u32 to = base + kBiasesAt + ring.slot * kBiasBytes;
    const u32 full = bars.biases_full + 8 * ring.slot;
    barrier_wait(bars.biases_empty + 8 * ring.slot, ring.parity ^ 1);
    barrier_expect(full, kBiasPanels * kBiasRows * 128);
    for (u32 c = 0; c < kBiasPanels; ++c) {
      copy_4d(to + c * kBiasPanel, map, full,
              n * i32(kKeys) + i32((part * kBiasPanels + c) * kBiasKeys), head, row, batch);
    }
    ring.step();
  }
}

KEYFOLD_INLINE float2 read_biases(u32 address) {
  if constexpr (kBiasSize == 4) {
    const uint2 both = read_shared_pair(address);
    return {__uint_as_float(both.x), __uint_as_float(both.y)};
  }
  const u32 both = read_shared(address);
  if constexpr (kMaskType == 3) return {float16_value(both), float16_value(both >> 16)};
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

// A tile's values are added to the scores of two rows, whose places in a panel are `place`, as
// scores.cuh has them. kHides: some may be -Inf. Without a softcap scores are scaled here: where
// all are before, the compiler puts many aside.
template <bool kHides>
KEYFOLD_INLINE void add_biases(float (&s)[kKeys / 2], float scale, const u32 (&place)[2],
                               BiasRing& ring, u32 base, const Barriers& bars, bool speaks) {
  constexpr u32 kSteps = kBiasKeys / 8, kAtOnce = 4;  // of 8 keys, in a panel
#pragma unroll
  for (u32 part = 0; part < kBiasParts; ++part) {
    barrier_wait(bars.biases_full + 8 * ring.slot, ring.parity);
    const u32 from = base + kBiasesAt + ring.slot * kBiasBytes;
#pragma unroll
    for (u32 panel = 0; panel < kBiasPanels; ++panel) {
#pragma unroll
      for (u32 first = 0; first < kSteps; first += kAtOnce) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
          float2 biases[kAtOnce];
#pragma unroll
          for (u32 j = 0; j < kAtOnce; ++j) {
            const u32 at = (from + place[r]) ^ 8 * kBiasSize * (first + j);
            biases[j] = read_biases(at + panel * kBiasPanel);
          }
#pragma unroll
          for (u32 j = 0; j < kAtOnce; ++j) {
            const u32 i = 4 * ((part * kBiasPanels + panel) * kSteps + first + j) + 2 * r;
            if (!kSoftcap) s[i] *= scale, s[i + 1] *= scale;
            s[i] = kHides ? biased(s[i], biases[j].x) : s[i] + biases[j].x;
            s[i + 1] = kHides ? biased(s[i + 1], biases[j].y) : s[i + 1] + biases[j].y;
          }
        }
      }
    }
    __syncwarp();
    if (speaks) barrier_arrive(bars.biases_empty + 8 * ring.slot);
    ring.step();
  }
}

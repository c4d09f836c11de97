// From products on matrix units to scores: scale, softcap, mask, hidden keys. Of two rows of a tile
// a thread holds element 4 j + 2 r + e: row r, key first + 8 j + e.
#pragma once

#include "matrix_units.cuh"

constexpr bool kFinished = KEYFOLD_FINISHED;  // scores are more than products times the scale

// tanh with errors of 2^-22, far below those of 16-bit products: from kTanhNear on by two
// instructions of which the special functions have few, before it by an odd polynomial.
KEYFOLD_INLINE float tanh_fast(float x) {
  return 1.0f - 2.0f * reciprocal(1.0f + exp2_fast(x * (2.0f * kLog2e)));
}
KEYFOLD_INLINE float tanh_short(float x) {
  const float z = x * x;
  float p = 1.51953725e-2f;
  p = fmaf(p, z, -5.19479029e-2f);
  p = fmaf(p, z, 1.33081749e-1f);
  p = fmaf(p, z, -3.33323419e-1f);
  return fmaf(p, x * z, x);
}

// Products become scores but for `cap`, by which tanh is multiplied.
template <i32 kCount>
KEYFOLD_INLINE void scale_scores(float (&s)[kCount], const Params& p, float cap) {
#pragma unroll
  for (i32 i = 0; i < kCount; ++i) s[i] *= p.scale;
  if constexpr (!kSoftcap) return;
  if constexpr (kDType == 0) {
#pragma unroll
    for (i32 i = 0; i < kCount; ++i) s[i] = cap * tanh_precise(s[i]);
    return;
  }
  float most[4] = {};  // NaN takes either way
#pragma unroll
  for (i32 i = 0; i < kCount; ++i) most[i % 4] = fmaxf(most[i % 4], fabsf(s[i]));
  // Which of both an element takes is its own affair, so that its bits are.
  if (fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])) < kTanhNear) {
#pragma unroll
    for (i32 i = 0; i < kCount; ++i) s[i] = cap * tanh_short(s[i]);
  } else {
#pragma unroll
    for (i32 i = 0; i < kCount; ++i) {
      s[i] = cap * (fabsf(s[i]) < kTanhNear ? tanh_short(s[i]) : tanh_fast(s[i]));
    }
  }
}

// Whether masks of two neighbouring keys, the first of which is even, are one aligned word.
KEYFOLD_INLINE bool masks_in_pairs(const Params& p) {
  constexpr u32 kSize = kMaskType == 1 ? 1 : kMaskType == 2 ? 4 : 2;
  const u64 all = p.mask | u64(p.mask_row) | u64(p.mask_head) | u64(p.mask_batch);
  return p.mask_key == kSize && all % (2 * kSize) == 0;
}
struct Biases {
  float of[2];
};
KEYFOLD_INLINE Biases load_biases(u64 at) {
  if constexpr (kMaskType == 1) {
    unsigned short both;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(both) : "l"(at));
    return {{(both & 0xff) != 0 ? 0.0f : hidden(), both >> 8 != 0 ? 0.0f : hidden()}};
  }
  if constexpr (kMaskType == 2) {
    const float2 both = load_float2(at);
    return {{both.x, both.y}};
  }
  const u32 both = load_word(at);
  if constexpr (kMaskType == 3) return {{float16_value(both), float16_value(both >> 16)}};
  return {{__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)}};
}
KEYFOLD_INLINE float biased(float s, float bias) {
  return bias == hidden() ? hidden() : (kMaskType == 1 ? s : s + bias);
}

// Of keys from `first` on, those that a row does not see.
template <i32 kCount>
KEYFOLD_INLINE void hide_outside(float (&s)[kCount], i32 first, Range row_0, Range row_1) {
#pragma unroll
  for (i32 i = 0; i < kCount; ++i) {
    const i32 key = first + i / 4 * 8 + i % 2;
    const Range& range = i / 2 % 2 == 0 ? row_0 : row_1;
    if (key < range.begin || key >= range.end) s[i] = hidden();
  }
}

// `mask`: of a row, the chunk's first key. `edge`: some row may not see some of the keys; then
// `seen(r)` is the keys that row r sees, and no other mask is read. kMasks: masks are added here.
// `cap`: see scale_scores().
template <bool kMasks = kMaskType != 0, i32 kCount, class Seen>
KEYFOLD_INLINE void finish_scores(float (&s)[kCount], const Params& p, const u64 (&mask)[2],
                                  i32 first, bool edge, float cap, const Seen& seen) {
  if constexpr (kFinished) scale_scores(s, p, cap);
  if (kMasks && !edge && masks_in_pairs(p)) {
#pragma unroll
    for (i32 i = 0; i < kCount; i += 2) {
      constexpr u32 kSize = kMaskType == 1 ? 1 : kMaskType == 2 ? 4 : 2;
      const Biases biases = load_biases(mask[i / 2 % 2] + i64(first) * kSize + i / 4 * 8 * kSize);
      s[i] = biased(s[i], biases.of[0]);
      s[i + 1] = biased(s[i + 1], biases.of[1]);
    }
    return;
  }
  if (!kMasks && !edge) return;
  const Range ranges[2] = {edge ? seen(0) : Range{-1 << 30, 1 << 30},
                           edge ? seen(1) : Range{-1 << 30, 1 << 30}};
#pragma unroll
  for (i32 i = 0; i < kCount; ++i) {
    const i32 key = first + i / 4 * 8 + i % 2, r = i / 2 % 2;
    if (key < ranges[r].begin || key >= ranges[r].end) {
      s[i] = hidden();
    } else if (kMasks) {
      s[i] = biased(s[i], mask_value(mask[r] + i64(key) * p.mask_key));
    }
  }
}

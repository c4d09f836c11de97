// What decode_mma.cu and decode_merge.cu have to agree on: units of keys, and their partial states.
#pragma once

#include "common.cuh"

// A split is cut into units, counted from its begin. Partial states are those of units:
// [groups of the chunk][units of the wave][indices of the chunk].
constexpr i32 kUnitLen = KEYFOLD_UNIT_LEN, kUnits = i32(kSplitLen) / kUnitLen;
static_assert(kUnits * kUnitLen == i32(kSplitLen), "whole units");
static_assert((kUnits & (kUnits - 1)) == 0, "units are merged in pairs");

// The row of an index. Rows are few in these kernels, so that a float's quotient is off by one at
// most; a division of integers is much longer.
KEYFOLD_INLINE u32 row_of(const Params& p, u32 index) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(float(p.heads)));
  u32 row = u32((float(index) + 0.5f) * inverse);
  if (row * p.heads > index) --row;
  if (index - row * p.heads >= p.heads) ++row;
  return row;
}

// Units of the wave that the chunk's rows see of a batch entry.
KEYFOLD_INLINE Range units_of(const Params& p, const Batch& batch) {
  const i32 first = i32(p.split * kSplitLen), last = first + i32(p.num_splits * kSplitLen);
  const i32 begin = larger(first, visible(batch, row_of(p, p.index_begin)).begin);
  const i32 end = smaller(last, visible(batch, row_of(p, p.index_end - 1)).end);
  if (begin >= end) return {0, 0};
  return {(begin - first) / kUnitLen, (end - first + kUnitLen - 1) / kUnitLen};
}

// Number of a row's partial state.
KEYFOLD_INLINE u64 unit_index(const Params& p, u32 group, i32 unit, u32 index) {
  return (u64(group - p.group) * p.num_splits * kUnits + u32(unit)) *
             (p.index_end - p.index_begin) +
         (index - p.index_begin);
}

// Two partial states become one, whichever comes first. (m, l) is (-inf, -1) where nothing is seen.
// A side of factor 0 is left out, as 0 times its Inf or NaN would be NaN.
KEYFOLD_INLINE float join_values(float a, float b, float factor_a, float factor_b) {
  return (factor_a == 0.0f ? 0.0f : a * factor_a) + (factor_b == 0.0f ? 0.0f : b * factor_b);
}
// a becomes that of both; returns the factors of a and b.
KEYFOLD_INLINE float2 join_sums(float2& a, float2 b) {
  const bool first = a.x > b.x || is_nan(a.x);
  const float m = first ? a.x : b.x, less = exp_nonpositive((first ? b.x : a.x) - base_of(m));
  const float most = m == hidden() ? 0.0f : is_nan(m) ? m : 1.0f;
  const float2 f = {first ? most : less, first ? less : most};
  const float l = join_values(a.y, b.y, f.x, f.y);
  a = {m, l == 0.0f ? -1.0f : l};
  return f;
}

// Products of decode by mma.sync, and what is done about Inf and NaN in V.
#pragma once

#include "decode_copies.cuh"

constexpr i32 kChains = kHeadWidth >= 128 ? 2 : 1;  // of products, to wait less for each other

// How a unit is done. kFast is right unless V has Inf or NaN: then its sums of weights times marks
// say where these belong, and what is finite is added up without them, to the same bits.
enum Mode { kFast, kMarks, kFinite };
constexpr float kMarkWeight = 16;
KEYFOLD_INLINE u32 mark_of(u32 x, Mode mode) {
  // 1 / 16, 64, 49152: times the weight, sums of up to 512 of each are told apart.
  constexpr u32 kInfinity = kDType == 1 ? 0x7c00u : 0x7f80u;
  constexpr u32 kPositive = kDType == 1 ? 0x2c00u : 0x3d80u;
  constexpr u32 kNegative = kDType == 1 ? 0x5400u : 0x4280u;
  constexpr u32 kOdd = kDType == 1 ? 0x7a00u : 0x4740u;
  const u32 magnitude = x & 0x7fffu;
  if (mode == kFinite) return magnitude >= kInfinity ? 0 : x;
  if (magnitude < kInfinity) return 0;
  return magnitude > kInfinity ? kOdd : x == kInfinity ? kPositive : kNegative;
}
static_assert(kUnitLen / kStreams <= 512, "of a stream marks are told apart");
KEYFOLD_INLINE float weight_in(Mode mode, float weight) {
  return mode == kMarks ? (weight != 0.0f ? kMarkWeight : 0.0f) : weight;
}

// What a sum of marks says of an element of o: 1 of Inf, 2 of -Inf, 3 of NaN.
KEYFOLD_INLINE u32 odd_code(float sum) {
  const u32 positive = sum - 1024.0f * floorf(sum / 1024.0f) >= 1.0f ? 1 : 0;
  return sum >= 700000.0f ? 3 : positive + (sum >= 1024.0f ? 2 : 0);
}
KEYFOLD_INLINE float odd_value(u32 code) {
  return code == 1 ? -hidden() : code == 2 ? hidden() : nan();
}

// s = q k^T. `query(i, x)` gives columns 16 i to 16 i + 15 of q, `keys(i, n, x)` those of keys 16 n
// to 16 n + 15.
template <class Query, class Keys>
KEYFOLD_INLINE void multiply_keys(float (&s)[kStep / 2], const Query& query, const Keys& keys) {
  float sums[kChains][kStep / 2] = {};
#pragma unroll
  for (i32 i = 0; i < kHeadWidth / 16; ++i) {
    u32 a[4];
    query(i, a);
#pragma unroll
    for (i32 n = 0; n < kStep / 16; ++n) {
      u32 x[4];
      keys(i, n, x);
      multiply(sums[i % kChains] + 8 * n, a, x[0], x[1]);
      multiply(sums[i % kChains] + 8 * n + 4, a, x[2], x[3]);
    }
  }
#pragma unroll
  for (i32 i = 0; i < kStep / 2; ++i) {
    s[i] = kChains == 2 ? sums[0][i] + sums[kChains - 1][i] : sums[0][i];
  }
}

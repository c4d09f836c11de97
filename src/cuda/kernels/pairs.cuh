// Float32 as pairs of float16: x = (high + low) / scale, where a power of two for each row brings
// its largest element to where a pair holds 22 bits of it, and of all that is down to 2^-16 of it.
// A row that this does not suit is odd: of Inf or NaN, far from 1, or with many elements that are
// far smaller than its largest. It takes part as zeros, and is met in float32 beside.
//
// Tiles of K and V in shared memory, and as `pairs` leaves them in device memory: panels of 64
// columns as hopper.cuh has them, those of the highs, then those of the lows. Behind K's a record
// of what belongs to the keys.
#pragma once

#include "hopper.cuh"

constexpr u32 kKeys = KEYFOLD_KEYS;  // of a tile
constexpr u32 kHeadPanels = (kHeadDim + 63) / 64, kValuePanels = (kValueDim + 63) / 64;
constexpr u32 kHeadWidth = 64 * kHeadPanels, kValueWidth = 64 * kValuePanels;
constexpr u32 kKeyPanel = kKeys * 128;  // bytes
constexpr u32 kHeadPart = kHeadPanels * kKeyPanel, kValuePart = kValuePanels * kKeyPanel;

// The record: of each two keys the factors that K's pairs have to be multiplied by, then the
// biases, which are the logarithms of V's factors; of each key the unit of its weight; then a bit
// of each.
constexpr u32 kUnitsAt = 8 * kKeys;
constexpr u32 kOddKeysAt = kUnitsAt + 4 * kKeys;
constexpr u32 kOddValuesAt = kOddKeysAt + 8;
constexpr u32 kRecordBytes = kOddValuesAt + 8;
KEYFOLD_INLINE constexpr u32 factor_at(u32 key) { return key / 2 * 16 + key % 2 * 4; }
KEYFOLD_INLINE constexpr u32 bias_at(u32 key) { return factor_at(key) + 8; }
KEYFOLD_INLINE constexpr u32 unit_at(u32 key) { return kUnitsAt + 4 * key; }
// A tile in device memory.
constexpr u32 kRecordAt = 2 * kHeadPart, kValuesAt = kRecordAt + kRecordBytes;
constexpr u32 kTileBytes = kValuesAt + 2 * kValuePart;
static_assert(kKeys == 32 || kKeys == 64, "the bits of the record");

// What a launch works on.
struct Jobs {
  u64 pairs;   // [groups][tiles of keys of the wave] tiles
  u32 groups;  // of the chunk
  u32 tiles;   // of rows, in each
};
constexpr u32 kSplitTiles = kSplitLen / kKeys;
static_assert(kSplitLen % kKeys == 0);

constexpr i32 kTop = 14;         // the exponent that the largest element of a row of Q or K gets
constexpr i32 kValueTop = 10;    // and one of 2^0 in V: those from 2^-3 to 2^5 share a factor
constexpr i32 kWeightBits = 15;  // weights are taken times 2^kWeightBits
constexpr float kLn2 = 0.693147181f;
constexpr i32 kLargest = 40;  // exponent of a row that is not odd, and -kLargest the smallest

KEYFOLD_INLINE float power_of_two(i32 exponent) {
  return __uint_as_float(u32(127 + exponent) << 23);
}
KEYFOLD_INLINE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Of a row that is spread over kLanes neighbouring lanes: the exponent of its largest element.
struct RowExponent {
  i32 exponent;
  bool odd;
};
template <u32 kLanes, u32 kVectors>
KEYFOLD_INLINE RowExponent exponent_of(const float4 (&x)[kVectors]) {
  u32 most = 0;
#pragma unroll
  for (u32 i = 0; i < kVectors; ++i) {
    most = larger(larger(most, larger(magnitude(x[i].x), magnitude(x[i].y))),
                  larger(magnitude(x[i].z), magnitude(x[i].w)));
  }
#pragma unroll
  for (u32 i = 1; i < kLanes; i *= 2) most = larger(most, __shfl_xor_sync(~0u, most, i));
  if (most == 0) most = 127u << 23;
  const u32 small = most < 17u << 23 ? 1u << 23 : most - (16u << 23);  // 2^-16 of it
  u32 counts = 0;  // of elements that are smaller but not zero; of others, times 2^16
  const auto count = [&](float y) {
    const u32 bits = magnitude(y);
    counts += bits >= small ? 0x10000u : bits != 0 ? 1u : 0u;
  };
#pragma unroll
  for (u32 i = 0; i < kVectors; ++i) count(x[i].x), count(x[i].y), count(x[i].z), count(x[i].w);
#pragma unroll
  for (u32 i = 1; i < kLanes; i *= 2) counts += __shfl_xor_sync(~0u, counts, i);
  const i32 exponent = i32(most >> 23) - 127;
  return {exponent,
          exponent < -kLargest || exponent > kLargest || 3 * (counts & 0xffffu) > counts >> 16};
}

struct Pair {
  uint2 high, low;
};
KEYFOLD_INLINE Pair split(float4 x, float scale) {
  const auto halves = [&](float a, float b, u32& high, u32& low) {
    a *= scale, b *= scale;
    high = pack(a, b);
    low = pack(a - float16_value(high), b - float16_value(high >> 16));
  };
  Pair r;
  halves(x.x, x.y, r.high.x, r.low.x);
  halves(x.z, x.w, r.high.y, r.low.y);
  return r;
}
// Where word `word` of four elements of row `row` begins, in panels of panel_bytes.
KEYFOLD_INLINE u32 place_in_panels(u32 row, u32 word, u32 panel_bytes) {
  const u32 chunk = word / 2 % 8 ^ row % 8;
  return word / 16 * panel_bytes + row * 128 + chunk * 16 + word % 2 * 8;
}

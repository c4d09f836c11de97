// A unit's end: the streams' states become one partial state.
//
// Those of a split's units are merged in pairs, of pairs, and so on, by the unit's number alone. A
// block merges those that it has both of, as what is written between reads costs several times as
// much; the others are left to decode_merge.cu: the same tree, to the bit.
#pragma once

#include "decode_copies.cuh"

constexpr u32 kTileRows = KEYFOLD_TILE_ROWS;  // that a tile has in use, at most
constexpr u32 kLevels = KEYFOLD_LEVELS;       // of the tree of units, of which a left half can wait
static_assert(1 << kLevels <= kUnits, "as in kernel_shape.hpp");
constexpr u32 kLeftRows = 8 * kRowTeam;      // of a tile that are left to other warps at a time
constexpr u32 kLeftPitch = kValueWidth + 8;  // floats: rows begin in different banks
constexpr u32 kQuads = kValueDim / 4;

// Shared memory.
constexpr u32 kQueryAt = kStreams * kSlots * kSlotBytes;
constexpr u32 kQueryBytes =
    round_up(kRows * HeadTile::kPitch, 128);         // of the tile now; of the next
constexpr u32 kLeftAt = kQueryAt + 2 * kQueryBytes;  // o [kStreams][kLeftRows]
constexpr u32 kKeptAt = kLeftAt + kStreams * kLeftRows * kLeftPitch * 4;  // o [kLevels][kTileRows]
constexpr u32 kKeptSumsAt = kKeptAt + kLevels * kTileRows * kValueDim * 4;  // (m, l) likewise
constexpr u32 kFactorsAt = kKeptSumsAt + kLevels * kTileRows * 8;           // likewise
constexpr u32 kStatesAt = kFactorsAt + kLevels * kTileRows * 8;  // (m, l) [kStreams][kRows]
constexpr u32 kOddAt = kStatesAt + kStreams * kRows * 8;         // two bits an element of o
constexpr u32 kOddWords = (kWidth + 31) / 32;                    // of a thread
constexpr u32 kWaitingAt =
    kOddAt + kOddWords * kThreads * 4;  // bit i: a left half of level i waits
static_assert(kWaitingAt + 16 == KEYFOLD_SHARED, "as in kernel_shape.hpp");

// What a warp has of a unit's rows: of row g and g + 8 of 16, g = lane / 4.
struct Fold {
  float o[kWidth / 2];  // element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
  Sums sums[1];
  Range seen[2];
  Range full;  // keys that all rows of the tile see
  u64 mask[2];
};

// What waits in shared memory for the states of later units.
struct Waiting {
  unsigned char* shared;

  KEYFOLD_INLINE float4& o(u32 level, u32 row, u32 column) const {
    return *reinterpret_cast<float4*>(shared + kKeptAt +
                                      4 * ((level * kTileRows + row) * kValueDim + column));
  }
  KEYFOLD_INLINE float2& ml(u32 level, u32 row) const {
    return reinterpret_cast<float2*>(shared + kKeptSumsAt)[level * kTileRows + row];
  }
  // Of what waits, and of what joins it.
  KEYFOLD_INLINE float2& factors(u32 level, u32 row) const {
    return reinterpret_cast<float2*>(shared + kFactorsAt)[level * kTileRows + row];
  }
  KEYFOLD_INLINE u32& levels() const { return *reinterpret_cast<u32*>(shared + kWaitingAt); }
};

// Where a unit's state goes: it joins `level` others, and then waits itself or is written.
struct Way {
  u32 level;
  bool waits;
  bool goes_on;  // the block has the next unit too
  u32 waiting;   // levels of others that wait, then
};
KEYFOLD_INLINE Way way_of(const Params& p, const Cursor& at, u32 waiting) {
  Way way;
  const u32 unit = at.unit;
  for (way.level = 0; way.level < kLevels; ++way.level) {
    if (((unit & waiting) >> way.level & 1) == 0) break;
  }
  way.waiting = waiting & ~0u << way.level;
  // Where tiles take turns nothing waits.
  way.goes_on = num_tiles(p) == 1 && at.left > 1 && at.unit + 1 < at.units.end;
  way.waits = way.goes_on && way.level < kLevels && (unit >> way.level & 1) == 0;
  return way;
}

// (m, l) of 2^level units: of the first; the others have none.
KEYFOLD_INLINE void write_sums(const Params& p, u64 part, u32 level, float2 ml) {
  const u64 step = p.index_end - p.index_begin;
  for (u32 i = 0; i < 1u << level; ++i) {
    write(p.partial_ml + 8 * (part + i * step), i == 0 ? ml : float2{hidden(), -1.0f});
  }
}

// Writes what waits, as the block has no unit behind `at`.
KEYFOLD_INLINE void write_waiting(const Params& p, const Cursor& at, const Waiting& kept,
                                  u32 waiting, u32 used) {
  for (u32 level = 0; level < kLevels; ++level) {
    if ((waiting >> level & 1) == 0) continue;
    const i32 begin = at.unit >> (level + 1) << (level + 1);
    const u64 part = unit_index(p, at.group, begin, tile_first(p, at.tile));
    for (u32 i = threadIdx.x; i < used; i += kThreads) {
      write_sums(p, part + i, level, kept.ml(level, i));
    }
    for (u32 i = threadIdx.x; i < used * kQuads; i += kThreads) {
      const u32 row = i / kQuads, column = 4 * (i % kQuads);
      write(p.partial_o + 4 * ((part + row) * kValueDim + column), kept.o(level, row, column));
    }
  }
}

// (m, l) of a row; the streams' maxima become their factors.
KEYFOLD_INLINE void combine_sums(const Params& p, const Waiting& kept, const Way& way, u64 part,
                                 float2* states, u32 row) {
  float most = states[row].x, l = 0.0f;
  for (u32 j = 1; j < kStreams; ++j) {
    const float m = states[j * kRows + row].x;
    most = most > m || is_nan(most) ? most : m;
  }
  for (u32 j = 0; j < kStreams; ++j) {
    float2& of = states[j * kRows + row];
    of.x = factor_of(of.x, base_of(most), is_far(most));
    l = fmaf(of.y, of.x, l);
  }
  float2 ml = l == 0.0f ? float2{hidden(), -1.0f} : float2{most, l * kWeightUnit};
  for (u32 level = 0; level < way.level; ++level) {
    float2 both = kept.ml(level, row);
    kept.factors(level, row) = join_sums(both, ml);
    ml = both;
  }
  if (way.waits) {
    kept.ml(way.level, row) = ml;
  } else {
    write_sums(p, part + row, way.level, ml);
  }
}

// Makes one partial state of the streams', and sends it its way.
KEYFOLD_INLINE void combine(const Fold& c, const Params& p, const Cursor& at, unsigned char* shared,
                            u32 warp, u32 lane) {
  float2* const states = reinterpret_cast<float2*>(shared + kStatesAt);
  float* const left = reinterpret_cast<float*>(shared + kLeftAt);
  const Waiting kept{shared};
  const u32 stream = warp / kTeam, member = warp % kTeam;
  const u32 first = tile_first(p, at.tile), used = tile_last(p, at.tile) + 1 - first;
  __syncthreads();  // all have done with the unit before
  const Way way = way_of(p, at, kept.levels());
  const u64 part = unit_index(p, at.group, at.unit >> way.level << way.level, first);
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    if (8 * r >= kTileRows) break;
    const float l = quad_sum(c.sums[0].t[r]);
    if (lane % 4 == 0 && member % kColumnTeam == 0) {
      // A NaN: the row stays NaN whatever it meets.
      states[stream * kRows + member / kColumnTeam * 16 + lane / 4 + 8 * r] = {
          is_nan(l) ? nan() : c.sums[0].m[r], l};
    }
  }
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    if (8 * h >= kTileRows) break;
    if (h == 1) __syncthreads();
    float* const mine = left +
                        (stream * kLeftRows + member / kColumnTeam * 8 + lane / 4) * kLeftPitch +
                        member % kColumnTeam * kWidth + 2 * (lane % 4);
#pragma unroll
    for (u32 j = 0; j < kWidth / 8; ++j) {
      *reinterpret_cast<float2*>(mine + 8 * j) = {c.o[4 * j + 2 * h], c.o[4 * j + 2 * h + 1]};
    }
    __syncthreads();
    if (h == 0) {
      for (u32 i = threadIdx.x; i < used; i += kThreads)
        combine_sums(p, kept, way, part, states, i);
      __syncthreads();
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kLeftRows * kQuads; i += kThreads) {
      const u32 near = i / kQuads, column = 4 * (i % kQuads);
      const u32 row = near / 8 * 16 + near % 8 + 8 * h;
      if (row >= used) continue;
      float sum[4] = {};
#pragma unroll
      for (u32 j = 0; j < kStreams; ++j) {
        const float factor = states[j * kRows + row].x;
        const float4 x =
            *reinterpret_cast<const float4*>(left + (j * kLeftRows + near) * kLeftPitch + column);
        if (factor == 0.0f) continue;  // as 0 times its Inf or NaN would be NaN
        sum[0] = fmaf(x.x, factor, sum[0]);
        sum[1] = fmaf(x.y, factor, sum[1]);
        sum[2] = fmaf(x.z, factor, sum[2]);
        sum[3] = fmaf(x.w, factor, sum[3]);
      }
      for (float& x : sum) x *= kWeightUnit;
#pragma unroll 1
      for (u32 level = 0; level < way.level; ++level) {
        const float2 f = kept.factors(level, row);
        const float4 x = kept.o(level, row, column);
        const float before[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (u32 e = 0; e < 4; ++e) sum[e] = join_values(before[e], sum[e], f.x, f.y);
      }
      const float4 result = positive_zeros(sum);
      if (way.waits) {
        kept.o(way.level, row, column) = result;
      } else {
        write(p.partial_o + 4 * ((part + row) * kValueDim + column), result);
      }
    }
  }
  if (!way.goes_on) write_waiting(p, at, kept, way.waiting, used);
  if (threadIdx.x == 0) {
    kept.levels() = way.goes_on ? way.waiting | (way.waits ? 1u << way.level : 0) : 0;
  }
}

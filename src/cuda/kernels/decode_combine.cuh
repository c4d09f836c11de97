// A unit's end: the streams' states become one partial state.
//
// These are merged in pairs, of pairs, and so on, by the stream's number; then those of a split's
// units, by the unit's number alone. A block merges those that it has both of, as what is written
// between reads costs several times as much; the others are left to decode_merge.cu: the same tree,
// to the bit.
#pragma once

#include "decode_cursor.cuh"

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
// Of many rows the factors are found once for all columns: [kJoins][kTileRows].
constexpr bool kFactorsApart = kTileRows > 8;
constexpr u32 kJoins = kStreams - 1 + kLevels;
constexpr u32 kFactorsAt = kKeptSumsAt + kLevels * kTileRows * 8;
constexpr u32 kStatesAt = kFactorsAt + (kFactorsApart ? kJoins * kTileRows * 8 : 0);
// (m, l) [kStreams][kRows]
constexpr u32 kOddAt = kStatesAt + kStreams * kRows * 8;  // two bits an element of o
constexpr u32 kOddWords = (kWidth + 31) / 32;             // of a thread
constexpr u32 kWaitingAt =
    kOddAt + kOddWords * kThreads * 4;  // bit i: a left half of level i waits
static_assert(kWaitingAt + 16 == KEYFOLD_SHARED, "as in kernel_shape.hpp");

// What a warp has of a unit's rows: of row g and g + 8 of 16, g = lane / 4.
struct Fold {
  float o[kWidth / 2];  // element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
  Sums sums[1];
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
  // Of the two sides of a join.
  KEYFOLD_INLINE float2& factors(u32 join, u32 row) const {
    return reinterpret_cast<float2*>(shared + kFactorsAt)[join * kTileRows + row];
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
  way.level = __ffs(~(unit & waiting)) - 1;  // none waits at level kLevels
  way.waiting = waiting & ~0u << way.level;
  // Where tiles take turns nothing waits.
  way.goes_on = num_tiles(p) == 1 && at.left > 1 && at.unit + 1 < at.units.end;
  way.waits = way.goes_on && way.level < kLevels && (unit >> way.level & 1) == 0;
  return way;
}

// (m, l) of 2^level units: of the first; the others have none.
KEYFOLD_INLINE void write_sums(const Params& p, u64 part, u32 level, float2 ml) {
  const u64 step = p.index_end - p.index_begin;
#pragma unroll 1
  for (u32 i = 0; i < 1u << level; ++i) {
    write(p.partial_ml + 8 * (part + i * step), i == 0 ? ml : float2{hidden(), -1.0f});
  }
}

// Writes what waits, as the block has no unit behind `at`.
KEYFOLD_INLINE void write_waiting(const Params& p, const Cursor& at, const Waiting& kept,
                                  u32 waiting, u32 used) {
#pragma unroll 1
  for (u32 level = 0; waiting >> level != 0; ++level) {
    if ((waiting >> level & 1) == 0) continue;
    const i32 begin = at.unit >> (level + 1) << (level + 1);
    const u64 part = unit_index(p, at.group, begin, tile_first(p, at.tile));
#pragma unroll 1
    for (u32 i = threadIdx.x; i < used; i += kThreads) {
      write_sums(p, part + i, level, kept.ml(level, i));
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < used * kQuads; i += kThreads) {
      const u32 row = i / kQuads, column = 4 * (i % kQuads);
      write(p.partial_o + 4 * ((part + row) * kValueDim + column), kept.o(level, row, column));
    }
  }
}

// Joins the streams' states of a row in pairs, then what waits for these. `with(join, ml, other)`
// joins two (m, l) and gives the factors; `values(j, other, factors)` does it to what belongs
// to streams j and other, and `kept_values(level, factors)` with what waits. Returns (m, l).
template <class With, class Values, class KeptValues>
KEYFOLD_INLINE float2 join_all(const float2* states, const Waiting& kept, const Way& way, u32 row,
                               const With& with, const Values& values,
                               const KeptValues& kept_values) {
  float2 ml[kStreams];
#pragma unroll
  for (u32 j = 0; j < kStreams; ++j) ml[j] = states[j * kRows + row];
  u32 join = 0;
#pragma unroll
  for (u32 span = 1; span < kStreams; span *= 2) {
#pragma unroll
    for (u32 j = 0; j < kStreams; j += 2 * span) {
      values(j, j + span, with(join++, ml[j], ml[j + span]));
    }
  }
#pragma unroll 1
  for (u32 level = 0; level < way.level; ++level) {
    float2 both = kept.ml(level, row);
    const float2 f = with(join++, both, ml[0]);
    ml[0] = both;
    kept_values(level, f);
  }
  return ml[0];
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
      const float2 ml{is_nan(l) ? nan() : c.sums[0].m[r], l * kWeightUnit};
      states[stream * kRows + member / kColumnTeam * 16 + lane / 4 + 8 * r] =
          l == 0.0f ? float2{hidden(), -1.0f} : ml;
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
    const auto keep_sums = [&](u32 row, float2 ml) {
      if (way.waits) {
        kept.ml(way.level, row) = ml;
      } else {
        write_sums(p, part + row, way.level, ml);
      }
    };
    if (kFactorsApart && h == 0) {
      for (u32 i = threadIdx.x; i < used; i += kThreads) {
        const auto with = [&](u32 join, float2& a, float2 b) {
          return kept.factors(join, i) = join_sums(a, b);
        };
        keep_sums(i, join_all(
                         states, kept, way, i, with, [](u32, u32, float2) {}, [](u32, float2) {}));
      }
      __syncthreads();
    }
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kLeftRows * kQuads; i += kThreads) {
      const u32 near = i / kQuads, column = 4 * (i % kQuads);
      const u32 row = near / 8 * 16 + near % 8 + 8 * h;
      if (row >= used) continue;
      float o[kStreams][4];
#pragma unroll
      for (u32 j = 0; j < kStreams; ++j) {
        const float4 x =
            *reinterpret_cast<const float4*>(left + (j * kLeftRows + near) * kLeftPitch + column);
        o[j][0] = x.x * kWeightUnit;
        o[j][1] = x.y * kWeightUnit;
        o[j][2] = x.z * kWeightUnit;
        o[j][3] = x.w * kWeightUnit;
      }
      const auto with = [&](u32 join, float2& a, float2 b) {
        return kFactorsApart ? kept.factors(join, row) : join_sums(a, b);
      };
      const auto values = [&](u32 j, u32 other, float2 f) {
        for (u32 e = 0; e < 4; ++e) o[j][e] = join_values(o[j][e], o[other][e], f.x, f.y);
      };
      const auto kept_values = [&](u32 level, float2 f) {
        const float4 x = kept.o(level, row, column);
        o[0][0] = join_values(x.x, o[0][0], f.x, f.y);
        o[0][1] = join_values(x.y, o[0][1], f.x, f.y);
        o[0][2] = join_values(x.z, o[0][2], f.x, f.y);
        o[0][3] = join_values(x.w, o[0][3], f.x, f.y);
      };
      const float2 ml = join_all(states, kept, way, row, with, values, kept_values);
      if (!kFactorsApart && column == 0) keep_sums(row, ml);
      const float4 result = positive_zeros(o[0]);
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

// Rows of K, V and q of decode by mma.sync: their way into shared memory, and where matrices lie
// there.
#pragma once

#include "fold.cuh"
#include "mma.cuh"
#include "units.cuh"

constexpr i32 kStep = kKeys, kStreams = KEYFOLD_STREAMS;  // these decide bits
constexpr i32 kRowTeam = KEYFOLD_ROW_TEAM, kColumnTeam = KEYFOLD_COLUMN_TEAM;
constexpr i32 kTeam = kRowTeam * kColumnTeam;
constexpr i32 kRows = 16 * kRowTeam;  // of a tile
static_assert(kUnitLen % (kStep * kStreams) == 0, "as in kernel_shape.hpp");

KEYFOLD_INLINE constexpr i32 round_up(i32 x, i32 to) { return (x + to - 1) / to * to; }
// Columns of products; those that are not in memory are zero.
constexpr i32 kHeadWidth = round_up(kHeadDim, 16);
constexpr i32 kWidth = kColumnTeam == 1 ? round_up(kValueDim, 16)
                                        : round_up(kValueDim, 64 * kColumnTeam) / kColumnTeam;
constexpr i32 kValueWidth = kWidth * kColumnTeam;
constexpr i32 kSlots = KEYFOLD_SLOTS;  // of a ring, each of a step of K or of V
constexpr bool kPadded = kHeadWidth != kHeadDim || kValueWidth != kValueDim;
static_assert(kSlots >= 2 && (!kPadded || kSlots % 2 == 0 || kHeadDim == kValueDim),
              "the zeros of K and V differ");

// Tiles in shared memory: rows of whole words of 16 bytes. Where they are whole lines of 128 bytes
// word w of row r lies at w ^ (r % 8), else their number is odd: what ldmatrix reads together lies
// in all banks either way.
template <i32 kElements>
struct Tile {
  static constexpr i32 kWords = kElements / 8;
  static constexpr bool kSwizzled = kWords % 8 == 0;
  static constexpr u32 kPitch = 16 * (kSwizzled ? kWords : kWords | 1);
  static KEYFOLD_INLINE u32 at(u32 row, u32 word) {
    return row * kPitch + 16 * (kSwizzled ? word ^ (row & 7) : word);
  }
};
using HeadTile = Tile<kHeadWidth>;
using ValueTile = Tile<kValueWidth>;
constexpr u32 kSlotBytes = round_up(kStep * larger(HeadTile::kPitch, ValueTile::kPitch), 128);

// How the lanes of a team divide kStep rows of kDim elements. Where a row's words are so many,
// lanes copy side by side in rows; else they take the words of all rows in turn.
template <class Shape, i32 kDim>
struct Copier {
  static constexpr i32 kWords = kDim / 8, kPower = kWords & -kWords;  // of 16 bytes, in memory
  static constexpr bool kEven = kWords % 8 == 0 || kWords == kPower;
  static constexpr i32 kLanes = smaller(32, kPower), kAtOnce = 32 * kTeam / kLanes;  // rows
  static constexpr i32 kCount = kStep * kWords;

  // What this lane has of a tile at `from`.
  static KEYFOLD_INLINE u64 begin(u64 from, i64 pitch, u32 team_lane) {
    if (!kEven) return from;
    return from + i64(team_lane / kLanes) * pitch + 16 * (team_lane % kLanes);
  }
  // Copies it; zeros from row `rows` on, unless all are there.
  template <bool kAll>
  static KEYFOLD_INLINE void copy(u32 to, u64 from, i64 pitch, i32 rows, u32 team_lane) {
    team_lane = opaque(team_lane);  // registers are few
    if constexpr (kEven) {
      const i32 row = i32(team_lane) / kLanes, word = i32(team_lane) % kLanes;
#pragma unroll
      for (i32 i = 0; i < kStep; i += kAtOnce) {
        const i32 r = row + i;
        if (kStep % kAtOnce != 0 && r >= kStep) break;
#pragma unroll
        for (i32 j = 0; j < kWords; j += kLanes) {
          copy_one<kAll>(to + Shape::at(u32(r), u32(word)) + 16 * j, from + 16 * j, r < rows);
        }
        from += kAtOnce * pitch;
      }
    } else {
#pragma unroll
      for (i32 i = 0; i < kCount; i += 32 * kTeam) {
        const i32 at = i + i32(team_lane), r = at / kWords, word = at % kWords;
        if (kCount % (32 * kTeam) != 0 && at >= kCount) break;
        copy_one<kAll>(to + Shape::at(u32(r), u32(word)), from + r * pitch + 16 * word, r < rows);
      }
    }
  }

 private:
  template <bool kAll>
  static KEYFOLD_INLINE void copy_one(u32 to, u64 from, bool valid) {
    if constexpr (kAll) {
      copy_16(to, from);
    } else {
      copy_16(to, from, valid);
    }
  }
};
using HeadCopier = Copier<HeadTile, kHeadDim>;
using ValueCopier = Copier<ValueTile, kValueDim>;

// Where a lane's matrix row lies, for the i-th pair of words, and n times 16 rows further.
template <class Shape>
struct MatrixRows {
  u32 first[Shape::kSwizzled ? 4 : 1];
  KEYFOLD_INLINE MatrixRows(u32 row, u32 word) {
#pragma unroll
    for (u32 i = 0; i < sizeof(first) / 4; ++i) first[i] = Shape::at(row, word + 2 * i);
  }
  KEYFOLD_INLINE u32 at(u32 tile, i32 i, i32 n) const {
    const u32 rows = tile + 16 * u32(n) * Shape::kPitch;
    return Shape::kSwizzled ? rows + first[i % i32(sizeof(first) / 4)] + 128 * u32(i / 4)
                            : rows + first[0] + 32 * u32(i);
  }
};

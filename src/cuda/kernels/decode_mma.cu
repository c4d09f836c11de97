// Decode of 16-bit keys from compute capability 8.0 on: few query rows against many keys. What
// counts is that memory is never idle; products by mma.sync, for which the rows of a group (up to
// 16) share each key, are there to take few instructions.
//
// A unit of work is a tile of rows of one group against kUnitLen keys. Blocks stay, each walks over
// a range of units. Its streams (a warp, or a team of warps that share keys and divide rows or
// columns of values) take steps of keys in turn, each through a ring of shared memory of its own
// that cp.async keeps full across units: the block meets at a unit's end only, where the streams'
// states become one partial state, in fixed order. decode_merge.cu folds these. No answer from
// memory is waited for but that of the ring, as it would come behind all that is under way.
#include "fold.cuh"
#include "mma.cuh"
#include "results.cuh"
#include "units.cuh"

constexpr i32 kStep = kKeys, kStreams = KEYFOLD_STREAMS;  // these decide bits
constexpr i32 kRowTeam = KEYFOLD_ROW_TEAM, kColumnTeam = KEYFOLD_COLUMN_TEAM;
constexpr i32 kTeam = kRowTeam * kColumnTeam, kWarps = kStreams * kTeam;
constexpr i32 kSlots = KEYFOLD_SLOTS;  // of a ring, each of a step of K or of V
constexpr i32 kRows = 16 * kRowTeam;   // of a tile
static_assert(kThreads == 32 * kWarps && kUnitLen % (kStep * kStreams) == 0 && kSlots >= 3,
              "as in kernel_shape.hpp");

KEYFOLD_INLINE constexpr i32 round_up(i32 x, i32 to) { return (x + to - 1) / to * to; }
KEYFOLD_INLINE constexpr i32 bit_ceil(i32 x) { return x <= 1 ? 1 : 2 * bit_ceil((x + 1) / 2); }
// Columns of products; those that are not in memory are zero.
constexpr i32 kHeadWidth = round_up(kHeadDim, 16);
constexpr i32 kWidth = kColumnTeam == 1 ? round_up(kValueDim, 16)
                                        : round_up(kValueDim, 64 * kColumnTeam) / kColumnTeam;
constexpr i32 kValueWidth = kWidth * kColumnTeam;
constexpr bool kPadded = kHeadWidth != kHeadDim || kValueWidth != kValueDim;
static_assert(!kPadded || kSlots % 2 == 0 || kHeadDim == kValueDim, "the zeros of K and V differ");

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

// Queries stay in registers where these are enough.
constexpr bool kQueryShared = kHeadWidth / 4 + kWidth / 2 > 160;
constexpr i32 kChains = kHeadWidth >= 128 ? 2 : 1;  // of products, to wait less for each other
constexpr i32 kColumnBlocks = kWidth / 8;
// Blocks of 8 x 8 values that a warp exchanges at a time.
constexpr i32 kPass = smaller(kColumnBlocks, larger(1, KEYFOLD_EXCHANGED / kWarps));
constexpr i32 kPassPitch = 8 * kPass + 8;  // floats

// Shared memory.
constexpr u32 kQueryAt = kStreams * kSlots * kSlotBytes;
constexpr u32 kQueryBytes =
    round_up(kRows * HeadTile::kPitch, 128);  // of the tile now; of the next
constexpr u32 kBufferAt = kQueryAt + 2 * kQueryBytes;
constexpr u32 kStatesAt = kBufferAt + kWarps * 8 * kPassPitch * 4;  // float2 [kStreams][kRows]
constexpr u32 kSumsAt = kStatesAt + kStreams * kRows * 8;           // l [kRows]
static_assert(kSumsAt + kRows * 4 == KEYFOLD_SHARED, "as in kernel_shape.hpp");

// --- Units --------------------------------------------------------------------------------------

// A place in the order of units: [group][unit of keys][tile of rows].
struct Cursor {
  u32 left;  // units of this block, with this one
  u32 group, batch, head;
  u32 tile;
  i32 unit;
  Range units;  // of the wave, that rows see
  Batch seen;
  i32 step, end;  // of this stream, in the unit
};

KEYFOLD_INLINE u32 num_tiles(const Params& p) {
  return (p.index_end - p.index_begin + kRows - 1) / kRows;
}
KEYFOLD_INLINE u32 tile_first(const Params& p, u32 tile) { return p.index_begin + tile * kRows; }
KEYFOLD_INLINE u32 tile_last(const Params& p, u32 tile) {
  return smaller(tile_first(p, tile) + kRows, p.index_end) - 1;
}
KEYFOLD_INLINE i32 unit_begin(const Params& p, i32 unit) {
  return i32(p.split * kSplitLen) + unit * kUnitLen;
}
KEYFOLD_INLINE i32 key_of(const Params& p, const Cursor& c, u32 stream, i32 step) {
  return unit_begin(p, c.unit) + (step * kStreams + i32(stream)) * kStep;
}

// Sets the unit's steps.
KEYFOLD_INLINE void enter(const Params& p, Cursor& c, u32 stream) {
  const i32 first = unit_begin(p, c.unit), skipped = kStreams - 1 - i32(stream);
  const i32 begin = larger(0, visible(c.seen, tile_first(p, c.tile) / p.heads).begin - first);
  const i32 end = smaller(kUnitLen, visible(c.seen, tile_last(p, c.tile) / p.heads).end - first);
  c.step = (begin / kStep + skipped) / kStreams;
  c.end = begin < end ? ((end + kStep - 1) / kStep + skipped) / kStreams : 0;
  c.end = larger(c.step, c.end);
}
KEYFOLD_INLINE void look_up(const Params& p, Cursor& c) {
  c.seen = load_batch(p, c.batch);
  c.units = units_of(p, c.seen);
}
KEYFOLD_INLINE void advance(const Params& p, Cursor& c, u32 stream) {
  if (--c.left == 0) return;
  if (++c.tile == num_tiles(p)) {
    c.tile = 0;
    if (++c.unit == c.units.end) {
      do {
        ++c.group;
        if (++c.head == p.kv_heads) {
          c.head = 0;
          ++c.batch;
          look_up(p, c);
        }
      } while (c.units.begin == c.units.end);
      c.unit = c.units.begin;
    }
  }
  enter(p, c, stream);
}

// Where this block comes to other queries; false where it never does.
KEYFOLD_INLINE bool next_turn(const Params& p, Cursor& c, u32 stream) {
  const u32 here = num_tiles(p) > 1 ? 1 : u32(c.units.end - c.unit);
  if (c.left <= here) return false;
  c.left -= here - 1;
  c.unit += i32(here) - 1;
  advance(p, c, stream);
  return true;
}

// Units of a batch entry.
KEYFOLD_INLINE u32 count_units(const Params& p, const Jobs& jobs, u32 batch) {
  const u32 begin = larger(p.group, batch * p.kv_heads);
  const u32 end = smaller(p.group + jobs.groups, (batch + 1) * p.kv_heads);
  if (begin >= end) return 0;
  const Range units = units_of(p, load_batch(p, batch));
  return (end - begin) * num_tiles(p) * u32(units.end - units.begin);
}
// This block's units: all blocks get the same number, or one more. Each lane looks at one of 32
// batch entries.
KEYFOLD_INLINE Cursor begin_of(const Params& p, const Jobs& jobs, u32 stream, u32 lane) {
  Cursor c;
  const u32 first = p.group / p.kv_heads, last = (p.group + jobs.groups - 1) / p.kv_heads;
  u32 total = 0;
  for (u32 batch = first; batch <= last; batch += 32) {
    u32 n = count_units(p, jobs, batch + lane);
    for (u32 i = 16; i > 0; i /= 2) n += __shfl_xor_sync(~0u, n, i);
    total += n;
  }
  u32 at = u32(u64(total) * blockIdx.x / gridDim.x);
  c.left = u32(u64(total) * (blockIdx.x + 1) / gridDim.x) - at;
  c.step = c.end = 0;
  if (c.left == 0) return c;
  for (u32 batch = first;; batch += 32) {
    const u32 n = count_units(p, jobs, batch + lane);
    u32 sum = n;  // of the lanes up to this
    for (u32 i = 1; i < 32; i *= 2) {
      const u32 before = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += before;
    }
    const u32 here = __ballot_sync(~0u, sum > at);
    if (here == 0) {
      at -= __shfl_sync(~0u, sum, 31);
      continue;
    }
    const u32 i = __ffs(here) - 1;
    at -= __shfl_sync(~0u, sum - n, i);
    c.batch = batch + i;
    break;
  }
  look_up(p, c);
  const u32 tiles = num_tiles(p), of_group = tiles * u32(c.units.end - c.units.begin);
  c.group = larger(p.group, c.batch * p.kv_heads) + at / of_group;
  c.head = c.group - c.batch * p.kv_heads;
  c.unit = c.units.begin + i32(at % of_group / tiles);
  c.tile = at % of_group % tiles;
  enter(p, c, stream);
  return c;
}

// --- Copies -------------------------------------------------------------------------------------

// Copies the part that this lane of a team has of kStep rows from key `key` on; zeros from `limit`
// on.
template <class Shape, i32 kDim>
KEYFOLD_INLINE void copy_rows(u32 to, u64 from, i64 pitch, i32 key, i32 limit, u32 team_lane) {
  constexpr i32 kWords = kDim / 8, kPower = kWords & -kWords;  // of 16 bytes, in memory
  // Lanes that copy side by side in a row; all of 8 words, where these are swizzled.
  constexpr bool kEven = kPower >= (Shape::kSwizzled ? 8 : 4) || kWords == kPower;
  constexpr i32 kLanes = smaller(32, kEven ? kPower : bit_ceil(kWords));
  constexpr i32 kAtOnce = 32 * kTeam / kLanes;  // rows
  const i32 row = i32(team_lane) / kLanes, word = i32(team_lane) % kLanes;
  if (kWords < kLanes && word >= kWords) return;
  from += i64(key + row) * pitch + 16 * word;
#pragma unroll
  for (i32 i = 0; i < kStep; i += kAtOnce) {
    const i32 r = row + i;
    if (kStep % kAtOnce != 0 && r >= kStep) break;
#pragma unroll
    for (i32 j = 0; j < kWords; j += kLanes) {
      if (kWords % kLanes != 0 && word + j >= kWords) break;
      copy_16(to + Shape::at(u32(r), u32(word)) + 16 * j, from + 16 * j, key + r < limit);
    }
    from += kAtOnce * pitch;
  }
}

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

// --- Products -----------------------------------------------------------------------------------

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
KEYFOLD_INLINE void mark_values(unsigned char* tile, Mode mode, u32 team_lane) {
  for (u32 i = team_lane; i < kStep * ValueTile::kPitch / 4; i += 32 * kTeam) {
    u32* const at = reinterpret_cast<u32*>(tile) + i;
    *at = mark_of(*at & 0xffffu, mode) | mark_of(*at >> 16, mode) << 16;
  }
}
KEYFOLD_INLINE float unmark(float sum) {
  if (sum >= 700000.0f) return nan();
  const bool negative = sum >= 1024.0f, positive = sum - 1024.0f * floorf(sum / 1024.0f) >= 1.0f;
  return negative ? (positive ? nan() : hidden()) : positive ? -hidden() : 0.0f;
}
KEYFOLD_INLINE float weight_in(Mode mode, float weight) {
  return mode == kMarks ? (weight != 0.0f ? kMarkWeight : 0.0f) : weight;
}

// What a warp has of a unit's rows: of row g and g + 8 of 16, g = lane / 4.
struct Fold {
  float o[kWidth / 2];  // element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
  Sums sums[1];
  Range seen[2];
  Range full;  // keys that all rows of the tile see
  u64 mask[2];
};

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

// Products become weights, o as of the new maxima.
KEYFOLD_INLINE void soften(Fold& c, const Params& p, i32 key, u32 lane, Mode mode,
                           float (&s)[1][kStep / 2]) {
  const bool edge = key < c.full.begin || key + kStep > c.full.end;
  if (kFinished || edge) {
    finish_scores(s[0], p, c.mask, key + 2 * i32(lane % 4), edge, [&](u32 r) { return c.seen[r]; });
  }
  float alpha[1][2];
  softmax(s, c.sums, p, alpha);
  // A factor of 1 changes nothing.
  if (mode != kMarks && __any_sync(~0u, alpha[0][0] != 1.0f || alpha[0][1] != 1.0f)) {
#pragma unroll
    for (i32 i = 0; i < kWidth / 2; ++i) c.o[i] *= alpha[0][i / 2 % 2];
  }
}

// o += weights v.
template <class Values>
KEYFOLD_INLINE void multiply_values(Fold& c, const float (&s)[kStep / 2], Mode mode,
                                    const Values& values) {
#pragma unroll
  for (i32 n = 0; n < kStep / 16; ++n) {
    u32 a[4];
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      const float* const of = s + 8 * n + 2 * i;
      a[i] = pack(weight_in(mode, of[0]), weight_in(mode, of[1]));
    }
#pragma unroll
    for (i32 i = 0; i < kWidth / 16; ++i) {
      u32 x[4];
      values(i, n, x);
      multiply(c.o + 8 * i, a, x[0], x[1]);
      multiply(c.o + 8 * i + 4, a, x[2], x[3]);
    }
  }
}

// --- A unit's end -------------------------------------------------------------------------------

// Of a stream, whose weights are taken against its own maximum.
KEYFOLD_INLINE float factor_in(float m, float most) {
  return factor_of(m, base_of(most), is_far(most));
}

// Makes one partial state of the streams', and writes it. Returns, for the whole block, whether a
// row that is not all NaN holds Inf or NaN.
KEYFOLD_INLINE bool combine(Fold& c, const Params& p, const Cursor& at, Mode mode,
                            unsigned char* shared, u32 warp, u32 lane) {
  float2* const states = reinterpret_cast<float2*>(shared + kStatesAt);
  float* const sums = reinterpret_cast<float*>(shared + kSumsAt);
  float* const buffer = reinterpret_cast<float*>(shared + kBufferAt);
  const u32 stream = warp / kTeam, member = warp % kTeam;
  const u32 row = member / kColumnTeam * 16 + lane / 4;
  const u32 first = tile_first(p, at.tile), used = tile_last(p, at.tile) + 1 - first;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const float l = quad_sum(c.sums[0].t[r]);
    if (is_nan(l)) c.sums[0].m[r] = nan();  // the row stays NaN whatever it meets
    if (lane % 4 == 0 && member % kColumnTeam == 0) {
      states[stream * kRows + row + 8 * r] = {c.sums[0].m[r], l};
    }
  }
  __syncthreads();
  const auto most_of = [&](u32 row) {
    float most = states[row].x;
    for (u32 i = 1; i < kStreams; ++i) {
      const float m = states[i * kRows + row].x;
      most = most > m || is_nan(most) ? most : m;
    }
    return most;
  };
  const u64 part = unit_index(p, at.group, at.unit, first);
  for (u32 i = threadIdx.x; i < used; i += kThreads) {
    const float most = most_of(i);
    float l = 0.0f;
    for (u32 j = 0; j < kStreams; ++j) {
      const float2 state = states[j * kRows + i];
      l = fmaf(state.y, factor_in(state.x, most), l);
    }
    sums[i] = l;
    write(p.partial_ml + 8 * (part + i),
          l == 0.0f ? float2{hidden(), -1.0f} : float2{most, l * kWeightUnit});
  }
  bool found = false;
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    if (h == 1 && used <= 8) break;
    const float factor = factor_in(c.sums[0].m[h], most_of(row + 8 * h));
#pragma unroll
    for (i32 begin = 0; begin < kColumnBlocks; begin += kPass) {
#pragma unroll
      for (i32 j = 0; j < kPass; ++j) {
        if (begin + j >= kColumnBlocks) continue;
        float x[2];
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const float o = c.o[4 * (begin + j < kColumnBlocks ? begin + j : 0) + 2 * h + e];
          x[e] = factor == 0.0f ? 0.0f : mode == kMarks ? unmark(o) : o * factor;
        }
        *reinterpret_cast<float2*>(buffer + (warp * 8 + lane / 4) * kPassPitch + 8 * j +
                                   2 * (lane % 4)) = {x[0], x[1]};
      }
      __syncthreads();
      bool odd = false;
      for (u32 i = threadIdx.x; i < kTeam * 16 * kPass; i += kThreads) {
        const u32 column4 = i % (2 * kPass), r = i / (2 * kPass) % 8, of = i / (16 * kPass);
        const u32 mine = of / kColumnTeam * 16 + 8 * h + r, column = 8 * begin + 4 * column4;
        const u32 whole = of % kColumnTeam * kWidth + column;
        if (mine >= used || column >= kWidth || whole >= kValueDim) continue;
        float sum[4] = {};
        for (u32 j = 0; j < kStreams; ++j) {
          const float4 x = *reinterpret_cast<const float4*>(
              buffer + ((j * kTeam + of) * 8 + r) * kPassPitch + 4 * column4);
          sum[0] += x.x;
          sum[1] += x.y;
          sum[2] += x.z;
          sum[3] += x.w;
        }
        const u64 place = p.partial_o + 4 * ((part + mine) * kValueDim + whole);
        const float4 marked = mode == kFinite ? read_float4(place) : float4{0.0f, 0.0f, 0.0f, 0.0f};
        const float marks[4] = {marked.x, marked.y, marked.z, marked.w};
#pragma unroll
        for (u32 e = 0; e < 4 && mode != kMarks; ++e) {
          odd = odd || (!is_nan(sums[mine]) && !is_finite(sum[e]));
          sum[e] *= kWeightUnit;
          if (marks[e] != 0.0f) sum[e] += marks[e];
        }
        write(place, positive_zeros(sum));
      }
      found |= __syncthreads_or(odd) != 0;
    }
  }
  return found;
}

extern "C" __global__ void __launch_bounds__(kThreads, KEYFOLD_RESIDENT)
    decode_mma(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs,
               const __grid_constant__ Ends ends) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 base = shared_address(shared);
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 stream = warp / kTeam, member = warp % kTeam, team_lane = member * 32 + lane;
  const u32 row_member = member / kColumnTeam, column_member = member % kColumnTeam;
  const auto team_sync = [&] {
    if (kTeam == 1) {
      __syncwarp();
    } else {
      named_sync(1 + stream, 32 * kTeam);
    }
  };
  if (kPadded) {
    for (u32 i = threadIdx.x; i < kBufferAt / 16; i += kThreads) {
      reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
    }
    __syncthreads();
  }

  // Copies run kSlots - 1 slots ahead of what is used.
  Cursor c = begin_of(p, jobs, stream, lane);
  if (c.left == 0) return;
  Cursor ahead = c;
  const u32 ring = base + stream * kSlots * kSlotBytes, ring_end = ring + kSlots * kSlotBytes;
  u32 fill = ring, take = ring;
  const auto next = [&](u32& slot) {
    slot += kSlotBytes;
    if (slot == ring_end) slot = ring;
  };
  const auto seek = [&] {
    while (ahead.left != 0 && ahead.step == ahead.end) advance(p, ahead, stream);
  };
  // Commits since queries were asked for; and on top, which half of their memory holds those of
  // now.
  constexpr u32 kHalf = u32(1) << 31;
  u32 since = 0;
  const auto commit = [&] {
    copies_commit();
    ++since;
    __syncwarp();  // where some lanes had nothing to copy
  };
  const auto fill_keys = [&] {
    if (ahead.left != 0) {
      copy_rows<HeadTile, kHeadDim>(fill, p.k + ahead.batch * p.k_batch + ahead.head * p.k_head,
                                    p.k_key, key_of(p, ahead, stream, ahead.step), ahead.seen.limit,
                                    team_lane);
    }
    commit();
    next(fill);
  };
  const auto fill_values = [&] {
    if (ahead.left != 0) {
      copy_rows<ValueTile, kValueDim>(fill, p.v + ahead.batch * p.v_batch + ahead.head * p.v_head,
                                      p.v_key, key_of(p, ahead, stream, ahead.step),
                                      ahead.seen.limit, team_lane);
      ++ahead.step;
      seek();
    }
    commit();
    next(fill);
  };
  const auto begin_copies = [&] {
    fill = take = ring;
    seek();
#pragma unroll 1
    for (i32 i = 0; i < (kSlots - 1) / 2; ++i) {
      fill_keys();
      fill_values();
    }
    if (kSlots % 2 == 0) fill_keys();
  };
  // Queries come through the same copies, a tile ahead: an answer from memory that is waited for
  // takes as long as all that is under way.
  const auto fill_queries = [&](const Cursor& of, u32 half) {
    const u32 first = tile_first(p, of.tile), last = tile_last(p, of.tile);
    for (u32 i = threadIdx.x; i < kRows * kHeadWords; i += kThreads) {
      const u32 row = i / kHeadWords, word = i % kHeadWords;
      const u32 index = smaller(first + row, last);
      const u64 from =
          ends.q.at == 0 ? p.q + 2 * kHeadDim * state_index(p, of.group, index)
                         : address_of(ends.q, of.batch, of.head, index % p.heads, index / p.heads);
      copy_16(base + kQueryAt + half * kQueryBytes + HeadTile::at(row, word), from + 16 * word,
              true);
    }
    since &= kHalf;
  };
  fill_queries(c, 0);
  begin_copies();

  const u32 near = lane % 16, far = lane / 16 * 8 + lane % 8;
  const MatrixRows<HeadTile> query_rows(near, lane / 16), key_rows(far, lane / 8 % 2);
  const MatrixRows<ValueTile> value_rows(near, lane / 16);
  u32 q[kQueryShared ? 1 : kHeadWidth / 16][4];
  const auto shared_query = [&](i32 i, u32(&a)[4]) {
    const u32 rows = since / kHalf * kQueryBytes + 16 * row_member * HeadTile::kPitch;
    load_matrices(a, query_rows.at(base + kQueryAt + rows, i, 0));
  };
  const auto query = [&](i32 i, u32(&a)[4]) {
    if (kQueryShared) {
      shared_query(i, a);
    } else {
      for (u32 e = 0; e < 4; ++e) a[e] = q[kQueryShared ? 0 : i][e];
    }
  };
  Fold fold;
  u32 group = ~0u, tile = 0;  // whose q is here
#pragma unroll 1
  for (; c.left != 0; advance(p, c, stream)) {
    const u32 first = tile_first(p, c.tile), last = tile_last(p, c.tile);
    // Rows beyond the last are computed as this, and not written.
    const auto index_of = [&](u32 r) {
      return smaller(first + 16 * row_member + lane / 4 + 8 * r, last);
    };
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      fold.seen[r] = visible(c.seen, index_of(r) / p.heads);
      fold.mask[r] = kMaskType == 0 ? 0 : mask_address(p, c.batch, c.group, index_of(r));
    }
    fold.full = {visible(c.seen, last / p.heads).begin, visible(c.seen, first / p.heads).end};
    if (group != c.group || tile != c.tile) {
      if (group != ~0u) since ^= kHalf;
      group = c.group;
      tile = c.tile;
      if ((since & ~kHalf) >= kSlots - 1) {
        copies_wait<kSlots - 2>();
      } else {
        copies_wait<0>();
      }
      __syncthreads();
      if (!kQueryShared) {
#pragma unroll
        for (i32 i = 0; i < kHeadWidth / 16; ++i) shared_query(i, q[kQueryShared ? 0 : i]);
      }
      Cursor coming = c;
      if (next_turn(p, coming, stream)) fill_queries(coming, 1 - since / kHalf);
    }

#pragma unroll 1
    for (Mode mode = kFast;;) {
      fold.sums[0] = {{hidden(), hidden()}, {0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
      for (i32 i = 0; i < kWidth / 2; ++i) fold.o[i] = 0.0f;
#pragma unroll 1
      for (i32 step = c.step; step < c.end; ++step) {
        float s[1][kStep / 2];
        copies_wait<kSlots - 2>();
        team_sync();
        if (kSlots % 2 == 0) {
          fill_values();
        } else {
          fill_keys();
        }
        multiply_keys(s[0], query,
                      [&](i32 i, i32 n, u32(&x)[4]) { load_matrices(x, key_rows.at(take, i, n)); });
        next(take);
        soften(fold, p, key_of(p, c, stream, step), lane, mode, s);
        copies_wait<kSlots - 2>();
        team_sync();
        if (kSlots % 2 == 0) {
          fill_keys();
        } else {
          fill_values();
        }
        if (mode != kFast) {
          mark_values(shared + (take - base), mode, team_lane);
          team_sync();
        }
        const u32 values = take + 2 * kWidth * column_member;
        multiply_values(fold, s[0], mode, [&](i32 i, i32 n, u32(&x)[4]) {
          load_transposed(x, value_rows.at(values, i, n));
        });
        next(take);
      }
      const bool odd = combine(fold, p, c, mode, shared, warp, lane);
      if (mode == kFinite || (mode == kFast && !odd)) break;
      mode = mode == kFast ? kMarks : kFinite;
      ahead = c;
      copies_wait<0>();
      team_sync();
      begin_copies();
    }
  }
}

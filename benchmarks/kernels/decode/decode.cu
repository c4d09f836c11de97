// Decode: few query rows against many keys, float16 and bfloat16, on sm_80 and later.
//
// A unit of work is a tile of rows of one group against a sub-split of 512 keys, counted from key
// 0. Blocks stay, each walks over a range of units. Its streams (a warp, or a team of warps that
// share keys and divide rows or columns of values) take steps of keys in turn, each through a ring
// of shared memory of its own that cp.async keeps full across units: there is no barrier of the
// block but at a unit's end, where the streams' states become one partial state, in fixed order.
// The last block to finish a split (16 sub-splits) merges these in ascending order; the last to
// finish a tile's splits folds them into the state in memory, in ascending order. No bit depends on
// which block does what.
//
// Set by the host: KF_HEAD_DIM, KF_VALUE_DIM (of tiles: multiples of 16), KF_HEAD_PITCH,
// KF_VALUE_PITCH (elements of a row in memory: multiples of 8), KF_STEP (keys: 16 or 32),
// KF_STREAMS, KF_ROW_TEAM, KF_COLUMN_TEAM, KF_SLOTS, KF_BLOCKS (of a multiprocessor), KF_MASK (0
// none, 1 bool, 2 float32, 3 float16, 4 bfloat16), KF_SOFTCAP, KF_BFLOAT16. Of these KF_STEP and
// KF_STREAMS decide bits.
#include "ampere.cuh"
#include "params.cuh"

// p.split and p.num_splits count splits of kSplitLen keys. Partial states: of sub-splits,
// [groups of the chunk][splits of the wave * kSubs][indices of the chunk].
struct Work {
  uint groups;  // of the chunk
};

#ifndef KF_COMBINE
#define KF_COMBINE 32  // blocks of 8 x 8 values that warps exchange at a time
#endif
#ifndef KF_SUB_LEN
#define KF_SUB_LEN 512
#endif
constexpr int kHeadDim = KF_HEAD_DIM, kValueDim = KF_VALUE_DIM;
constexpr int kHeadPitch = KF_HEAD_PITCH, kValuePitch = KF_VALUE_PITCH;
constexpr int kStep = KF_STEP, kStreams = KF_STREAMS, kSlots = KF_SLOTS;
constexpr int kRowTeam = KF_ROW_TEAM, kColumnTeam = KF_COLUMN_TEAM, kTeam = kRowTeam * kColumnTeam;
constexpr int kRows = 16 * kRowTeam, kWarps = kStreams * kTeam, kThreads = 32 * kWarps;
constexpr int kSubLen = KF_SUB_LEN, kSplitLen = 8192, kSubs = kSplitLen / kSubLen;
// Columns of values of a warp.
constexpr int kColumns =
    kColumnTeam == 1 ? kValueDim : (kValueDim + 64 * kColumnTeam - 1) / (64 * kColumnTeam) * 64;
static_assert(kHeadDim % 16 == 0 && kColumns % 16 == 0 && kSubLen % (kStep * kStreams) == 0);
static_assert(kHeadPitch % 8 == 0 && kHeadPitch <= kHeadDim && kHeadPitch > kHeadDim - 16);
static_assert(kValuePitch % 8 == 0 && kValuePitch <= kColumns * kColumnTeam);

// A tile in shared memory: rows of kDim elements; what ldmatrix reads together lies in all banks.
template <int kDim, int kMemory>
struct Tile {
  static constexpr int kWords = kDim / 8;           // of 16 bytes, in a row
  static constexpr int kMemoryWords = kMemory / 8;  // of these in memory; the others stay zero
  static constexpr bool kSwizzled = kWords % 8 == 0;
  static constexpr uint kPitch = 16 * (kSwizzled ? kWords : kWords | 1);
  static constexpr int kPower = kMemoryWords & -kMemoryWords;
  static constexpr int roof(int n) { return n <= 1 ? 1 : 2 * roof((n + 1) / 2); }
  // Lanes that copy side by side in a row.
  static constexpr int kLanes = kPower >= 32 ? 32
                                : kPower >= 4 || kMemoryWords == kPower
                                    ? kPower
                                    : (kMemoryWords > 16 ? 32 : roof(kMemoryWords));
};
using HeadTile = Tile<kHeadDim, kHeadPitch>;
using ValueTile = Tile<kColumns * kColumnTeam, kValuePitch>;
constexpr uint round_up(uint a, uint b) { return (a + b - 1) / b * b; }
constexpr uint larger_of(uint a, uint b) { return a > b ? a : b; }
constexpr uint kSlotBytes = round_up(kStep * larger_of(HeadTile::kPitch, ValueTile::kPitch), 128);
constexpr bool kPadded =
    HeadTile::kWords != HeadTile::kMemoryWords || ValueTile::kWords != ValueTile::kMemoryWords;
static_assert(kSlots >= 3 && (!kPadded || kSlots % 2 == 0),
              "padding of keys and of values differs");

// Queries stay in registers where these are enough.
constexpr bool kQueryShared = kHeadDim / 4 + kColumns / 2 > 160;
constexpr int kChains = kHeadDim >= 128 ? 2 : 1;  // of products, to wait less for each other
constexpr int kKeyBlocks = kStep / 8, kColumnBlocks = kColumns / 8;
constexpr int kPass = kColumnBlocks < KF_COMBINE / kWarps ? kColumnBlocks : KF_COMBINE / kWarps;
constexpr int kPassPitch = 8 * kPass + 8;  // floats

// Shared memory.
constexpr uint kQueryAt = kStreams * kSlots * kSlotBytes;
constexpr uint kBufferAt = kQueryAt + (kQueryShared ? round_up(kRows * HeadTile::kPitch, 128) : 0);
constexpr uint kStatesAt = kBufferAt + kWarps * 8 * kPassPitch * 4;  // float2 [kStreams][kRows]
constexpr uint kSumsAt = kStatesAt + kStreams * kRows * 8;           // float2 [kRows]
constexpr uint kSharedBytes = kSumsAt + kRows * 8;

#ifdef KF_BFLOAT16
constexpr float kWeightBits = 0, kWeightUnit = 1;
#else
constexpr float kWeightBits = 15,
                kWeightUnit = 1.0f / 32768;  // float16 holds weights down to 2^-39
#endif
constexpr float kLog2e = 1.44269504f;
#define kHidden __int_as_float(0xff800000)
#define kNan __int_as_float(0x7fc00000)

DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
// What weights are taken against: m, or 0 where nothing is seen.
DEVICE float base_of(float m) { return m == kHidden ? 0.0f : m; }
DEVICE float factor_of(float m, float base) { return exp2_fast((m - base) * kLog2e); }

// The keys that a row sees, before masks: [x, y) counted from the chunk's first key.
DEVICE int2 visible(const Batch& b, int row) {
  const int end = max(0, min(b.limit, b.last + row));
  return make_int2(min(max(b.first + row, 0), end), end);
}

// A place in the order of units: [group][sub-split][tile of rows].
struct Cursor {
  uint left;  // units of this block, with this one
  uint group, batch, head;
  uint tile;
  int sub, sub_begin, sub_end;  // of the wave
  Batch seen;
  int step, end;  // of this stream, in the sub-split; a step is of kStep keys
};

DEVICE uint num_tiles(const Params& p) { return (p.index_end - p.index_begin + kRows - 1) / kRows; }
DEVICE Batch batch_at(const Params& p, uint batch) {
  return reinterpret_cast<const Batch*>(p.batches)[batch];
}
// Sub-splits of the wave that the chunk's rows see.
DEVICE int2 subs_of(const Params& p, const Batch& b) {
  const int begin = p.split * kSplitLen, end = begin + p.num_splits * kSplitLen;
  const int x = max(begin, visible(b, p.index_begin / p.heads).x);
  const int y = min(end, visible(b, (p.index_end - 1) / p.heads).y);
  if (x >= y) return make_int2(0, 0);
  return make_int2((x - begin) / kSubLen, (y - begin + kSubLen - 1) / kSubLen);
}
DEVICE int key_of(const Params& p, const Cursor& c, uint stream, int step) {
  return (p.split * kSubs + c.sub) * kSubLen + (step * kStreams + stream) * kStep;
}
DEVICE uint tile_first(const Params& p, uint tile) { return p.index_begin + tile * kRows; }
DEVICE uint tile_last(const Params& p, uint tile) {
  return min(tile_first(p, tile) + kRows, p.index_end) - 1;
}
// Sets the unit's steps.
DEVICE void enter(const Params& p, Cursor& c, uint stream) {
  const int begin = (p.split * kSubs + c.sub) * kSubLen;
  const int x = max(0, visible(c.seen, tile_first(p, c.tile) / p.heads).x - begin);
  const int y = min(kSubLen, visible(c.seen, tile_last(p, c.tile) / p.heads).y - begin);
  const int skipped = kStreams - 1 - stream;
  c.step = (max(x, 0) / kStep + skipped) / kStreams;
  c.end = x < y ? ((y + kStep - 1) / kStep + skipped) / kStreams : 0;
  c.end = max(c.step, c.end);
}
DEVICE void advance(const Params& p, Cursor& c, uint stream) {
  if (--c.left == 0) return;
  if (++c.tile == num_tiles(p)) {
    c.tile = 0;
    if (++c.sub == c.sub_end) {
      do {
        ++c.group;
        if (++c.head == p.kv_heads) {
          c.head = 0;
          c.seen = batch_at(p, ++c.batch);
          const int2 subs = subs_of(p, c.seen);
          c.sub_begin = subs.x;
          c.sub_end = subs.y;
        }
      } while (c.sub_begin == c.sub_end);
      c.sub = c.sub_begin;
    }
  }
  enter(p, c, stream);
}

// Units of the 32 batch entries from `batch` on, of which each lane looks at one.
DEVICE uint units_of(const Params& p, const Work& work, uint batch) {
  const uint begin = max(p.group, batch * p.kv_heads);
  const uint end = min(p.group + work.groups, (batch + 1) * p.kv_heads);
  if (begin >= end) return 0;
  const int2 subs = subs_of(p, batch_at(p, batch));
  return (end - begin) * num_tiles(p) * (subs.y - subs.x);
}
// This block's units: all blocks get the same number, or one more.
DEVICE Cursor begin_of(const Params& p, const Work& work, uint stream, uint lane) {
  Cursor c;
  const uint first = p.group / p.kv_heads, last = (p.group + work.groups - 1) / p.kv_heads;
  uint total = 0;
  for (uint batch = first; batch <= last; batch += 32) {
    uint n = units_of(p, work, batch + lane);
    for (uint i = 16; i > 0; i /= 2) n += __shfl_xor_sync(~0u, n, i);
    total += n;
  }
  uint at = uint(uint64(total) * blockIdx.x / gridDim.x);
  c.left = uint(uint64(total) * (blockIdx.x + 1) / gridDim.x) - at;
  c.step = c.end = 0;
  if (c.left == 0) return c;
  for (uint batch = first;; batch += 32) {
    const uint n = units_of(p, work, batch + lane);
    uint sum = n;  // of the lanes up to this
    for (uint i = 1; i < 32; i *= 2) {
      const uint before = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += before;
    }
    const uint here = __ballot_sync(~0u, sum > at);
    if (here == 0) {
      at -= __shfl_sync(~0u, sum, 31);
      continue;
    }
    const uint i = __ffs(here) - 1;
    at -= __shfl_sync(~0u, sum - n, i);
    c.batch = batch + i;
    break;
  }
  c.seen = batch_at(p, c.batch);
  const int2 subs = subs_of(p, c.seen);
  c.sub_begin = subs.x;
  c.sub_end = subs.y;
  const uint tiles = num_tiles(p), of_group = tiles * (subs.y - subs.x);
  c.group = max(p.group, c.batch * p.kv_heads) + at / of_group;
  c.head = c.group - c.batch * p.kv_heads;
  c.sub = c.sub_begin + at % of_group / tiles;
  c.tile = at % of_group % tiles;
  enter(p, c, stream);
  return c;
}

// Copies the part that this lane of a team has of kStep rows from key `key` on; zeros from `limit`
// on.
template <typename Shape>
DEVICE void copy_rows(uint to, uint64 from, int64 pitch, int key, int limit, uint team_lane) {
  constexpr int kLanes = Shape::kLanes, kAtOnce = 32 * kTeam / kLanes;  // rows
  constexpr bool kEven = (kAtOnce & (kAtOnce - 1)) == 0;
  const uint row = team_lane / kLanes, word = team_lane % kLanes;
  if (Shape::kMemoryWords < kLanes && word >= Shape::kMemoryWords) return;
  if (kAtOnce > kStep && row >= kStep) return;
  from += int64(key + int(row)) * pitch + 16 * word;
#pragma unroll
  for (int i = 0; i < (kStep + kAtOnce - 1) / kAtOnce; ++i) {
    const int r = row + i * kAtOnce;
    if (kStep % kAtOnce != 0 && r >= kStep) break;
    const int bytes = key + r < limit ? 16 : 0;
#pragma unroll
    for (int j = 0; j < Shape::kMemoryWords; j += kLanes) {
      uint w = word;
      if (Shape::kSwizzled) w = word ^ (kEven ? (row & 7) ^ (i * kAtOnce & 7) : r & 7);
      copy_async(to + r * Shape::kPitch + 16 * (w + j), from + 16 * j, bytes);
    }
    from += kAtOnce * pitch;
  }
}

// Where a lane's matrix row lies, for the i-th pair of 16-byte words (and 16 * n rows further).
template <typename Shape>
struct MatrixRows {
  uint at[Shape::kSwizzled ? 4 : 1];
  __device__ __forceinline__ MatrixRows(uint row, uint word) {
    if (Shape::kSwizzled) {
      for (int i = 0; i < 4; ++i) {
        at[Shape::kSwizzled ? i : 0] = row * Shape::kPitch + 16 * ((word ^ (row & 7)) ^ (2 * i));
      }
    } else {
      at[0] = row * Shape::kPitch + 16 * word;
    }
  }
  __device__ __forceinline__ uint operator()(uint tile, int i, int n) const {
    const uint rows = tile + 16 * n * Shape::kPitch;
    return Shape::kSwizzled ? rows + at[Shape::kSwizzled ? i % 4 : 0] + 128 * (i / 4)
                            : rows + at[0] + 32 * i;
  }
};

DEVICE float mask_value(uint64 address) {
#if KF_MASK == 1
  return *reinterpret_cast<const unsigned char*>(address) ? 0.0f : kHidden;
#elif KF_MASK == 2
  return *reinterpret_cast<const float*>(address);
#elif KF_MASK == 3
  return half_to_float(*reinterpret_cast<const unsigned short*>(address));
#elif KF_MASK == 4
  return __uint_as_float(uint(*reinterpret_cast<const unsigned short*>(address)) << 16);
#else
  return 0;
#endif
}
DEVICE float score_of(float product, const Params& p, float bias) {
  float s = __fmul_rn(product, p.scale);
#if KF_SOFTCAP
  // tanh; for a large argument 1 - 2 / inf
  s = p.softcap * (1 - 2 * reciprocal(1 + exp2_fast(s * (2 * kLog2e))));
#endif
#if KF_MASK == 1
  s = bias == kHidden ? kHidden : s;
#elif KF_MASK
  s = bias == kHidden ? kHidden : s + bias;
#endif
  return s;
}

// How a unit is done. kFast is right unless V has Inf or NaN: then its sums of weights times marks
// say where these belong, and what is finite is added up without them, to the same bits.
enum Mode { kFast, kMarks, kFinite };
constexpr float kMarkWeight = 16;
DEVICE uint transform(uint x, Mode mode) {
#ifdef KF_BFLOAT16
  const uint infinity = 0x7f80u, positive = 0x3d80u, negative = 0x4280u, nan = 0x4740u;
#else
  const uint infinity = 0x7c00u, positive = 0x2c00u, negative = 0x5400u, nan = 0x7a00u;
#endif  // 1 / 16, 64, 49152: sums of up to 512 of each are told apart
  const uint magnitude = x & 0x7fffu;
  if (mode == kFinite) return magnitude >= infinity ? 0 : x;
  if (magnitude < infinity) return 0;
  return magnitude > infinity ? nan : x == infinity ? positive : negative;
}
DEVICE void transform_values(unsigned char* tile, Mode mode, uint team_lane) {
  for (uint i = team_lane; i < kStep * ValueTile::kPitch / 4; i += 32 * kTeam) {
    uint* const at = reinterpret_cast<uint*>(tile) + i;
    *at = transform(*at & 0xffffu, mode) | transform(*at >> 16, mode) << 16;
  }
}
DEVICE float unmark(float sum) {
  if (sum >= 700000.0f) return kNan;
  const bool negative = sum >= 1024, positive = sum - 1024 * floorf(sum / 1024) >= 1;
  return negative ? (positive ? kNan : kHidden) : positive ? -kHidden : 0.0f;
}

// What a warp has of a unit's rows: of row g and g + 8 of 16, g = lane / 4.
struct Fold {
  float o[kColumnBlocks][4];  // columns 8 * j + 2 * (lane % 4) and the next; of g, then of g + 8
  float m[2], t[2];           // t: this lane's part of l
  int2 range[2];
  int full_begin, full_end;  // keys that all rows of the tile see
  uint64 mask[2];
};

DEVICE void load_masks(const Fold& c, const Params& p, int key, uint lane,
                       float (&bias)[kKeyBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = key + 8 * j + 2 * (lane % 4) + e % 2, r = e / 2;
      const bool seen = at >= c.range[r].x && at < c.range[r].y;
      bias[j][e] = seen ? mask_value(c.mask[r] + int64(at) * p.mask_key) : kHidden;
    }
  }
}

// Products to weights; o and l as of the new m.
DEVICE void soften(Fold& c, const Params& p, int key, uint lane, Mode mode,
                   float (&s)[kKeyBlocks][4], const float (&bias)[kKeyBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = score_of(s[j][e], p, bias[j][e]);
  }
  if (key < c.full_begin || key + kStep > c.full_end) {
#pragma unroll
    for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = key + 8 * j + 2 * (lane % 4) + e % 2, r = e / 2;
        if (at < c.range[r].x || at >= c.range[r].y) s[j][e] = kHidden;
      }
    }
  }
  float alpha[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < kKeyBlocks; ++j) {
      most = fmaxf(most, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    }
    most = fmaxf(c.m[r], quad_max(most));
    const float base = base_of(most);
    alpha[r] = factor_of(c.m[r], base);
    c.m[r] = most;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[j][e] = exp2_fast(fmaf(s[j][e] - base, kLog2e, kWeightBits));
        sum += s[j][e];
      }
    }
    c.t[r] = fmaf(c.t[r], alpha[r], sum);
  }
  // A factor of 1 changes nothing.
  if (mode != kMarks && __any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c.o[j][e] *= alpha[e / 2];
    }
  }
}

// `keys(i, n, x)` and `values(i, n, x)` give right sides: columns 16 * i to 16 * i + 15 of keys
// 16 * n to 16 * n + 15. `query(i, x)` gives a left side.
template <typename Query, typename Keys>
DEVICE void multiply_keys(float (&s)[kKeyBlocks][4], const Query& query, const Keys& keys) {
  float sums[kChains][kKeyBlocks][4] = {};
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint a[4];
    query(i, a);
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      uint x[4];
      keys(i, n, x);
      multiply(sums[i % kChains][2 * n], a, x[0], x[1]);
      multiply(sums[i % kChains][2 * n + 1], a, x[2], x[3]);
    }
  }
#pragma unroll
  for (int j = 0; j < kKeyBlocks; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = kChains == 2 ? sums[0][j][e] + sums[kChains - 1][j][e] : sums[0][j][e];
    }
  }
}
DEVICE float mark_of(float weight, Mode mode) {
  return mode == kMarks ? (weight != 0 ? kMarkWeight : 0.0f) : weight;
}
template <typename Values>
DEVICE void multiply_values(Fold& c, const float (&s)[kKeyBlocks][4], Mode mode,
                            const Values& values) {
#pragma unroll
  for (int n = 0; n < kStep / 16; ++n) {
    uint a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&of)[4] = s[2 * n + i / 2];
      a[i] = pack(mark_of(of[i % 2 * 2], mode), mark_of(of[i % 2 * 2 + 1], mode));
    }
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint x[4];
      values(i, n, x);
      multiply(c.o[2 * i], a, x[0], x[1]);
      multiply(c.o[2 * i + 1], a, x[2], x[3]);
    }
  }
}

// Number of a row's state, and of its q.
DEVICE uint64 state_index(const Params& p, uint group, uint index) {
  return uint64(group - p.block_group) * p.block_indices + index;
}
// Number of a row's partial state.
DEVICE uint64 partial_index(const Params& p, uint group, uint sub, uint index) {
  return (uint64(group - p.group) * p.num_splits * kSubs + sub) * (p.index_end - p.index_begin) +
         (index - p.index_begin);
}

// Makes one partial state of the streams', and writes it. Returns, for the whole block, whether a
// row that is not all NaN holds Inf or NaN.
DEVICE bool combine(Fold& c, const Params& p, const Cursor& at, Mode mode, unsigned char* shared,
                    uint warp, uint lane) {
  float2* const states = reinterpret_cast<float2*>(shared + kStatesAt);
  float2* const sums = reinterpret_cast<float2*>(shared + kSumsAt);
  float* const buffer = reinterpret_cast<float*>(shared + kBufferAt);
  const uint stream = warp / kTeam, member = warp % kTeam;
  const uint row = member / kColumnTeam * 16 + lane / 4;
  const uint first = tile_first(p, at.tile), used = tile_last(p, at.tile) + 1 - first;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float l = quad_sum(c.t[r]);
    if (l != l) c.m[r] = kNan;  // the row stays NaN whatever it meets
    if (lane % 4 == 0 && member % kColumnTeam == 0) {
      states[stream * kRows + row + 8 * r] = make_float2(c.m[r], l);
    }
  }
  __syncthreads();
  const auto most_of = [&](uint row) {
    float most = states[row].x;
    for (int i = 1; i < kStreams; ++i) most = max_or_nan(most, states[i * kRows + row].x);
    return most;
  };
  float factors[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) factors[r] = factor_of(c.m[r], base_of(most_of(row + 8 * r)));
  const uint64 part = partial_index(p, at.group, at.sub, first);
  for (uint i = threadIdx.x; i < used; i += kThreads) {
    const float most = most_of(i), base = base_of(most);
    float l = 0;
    for (int j = 0; j < kStreams; ++j) {
      const float2 state = states[j * kRows + i];
      l = fmaf(state.y, factor_of(state.x, base), l);
    }
    sums[i] = make_float2(most, l);
    reinterpret_cast<float2*>(p.partial_ml)[part + i] =
        l == 0 ? make_float2(kHidden, -1) : make_float2(most, l * kWeightUnit);
  }
  bool found = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (h == 1 && used <= 8) break;
#pragma unroll
    for (int j0 = 0; j0 < kColumnBlocks; j0 += kPass) {
      const float factor = factors[h];
#pragma unroll
      for (int j = 0; j < kPass; ++j) {
        if (j0 + j >= kColumnBlocks) continue;
        float2 x = make_float2(c.o[j0 + j < kColumnBlocks ? j0 + j : 0][2 * h],
                               c.o[j0 + j < kColumnBlocks ? j0 + j : 0][2 * h + 1]);
        if (mode == kMarks) {
          x = make_float2(unmark(x.x), unmark(x.y));
        } else {
          x = make_float2(x.x * factor, x.y * factor);
        }
        if (factor == 0) x = make_float2(0, 0);
        *reinterpret_cast<float2*>(buffer + (warp * 8 + lane / 4) * kPassPitch + 8 * j +
                                   2 * (lane % 4)) = x;
      }
      __syncthreads();
      bool odd = false;
      for (uint i = threadIdx.x; i < kTeam * 16 * kPass; i += kThreads) {
        const uint column4 = i % (2 * kPass), r = i / (2 * kPass) % 8, of = i / (16 * kPass);
        const uint mine = of / kColumnTeam * 16 + 8 * h + r, column = 8 * j0 + 4 * column4;
        const uint whole = of % kColumnTeam * kColumns + column;
        if (mine >= used || column >= kColumns || whole >= kValuePitch) continue;
        float4 sum = make_float4(0, 0, 0, 0);
        for (int j = 0; j < kStreams; ++j) {
          const float4 x = *reinterpret_cast<const float4*>(
              buffer + ((j * kTeam + of) * 8 + r) * kPassPitch + 4 * column4);
          sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        float4* const place =
            reinterpret_cast<float4*>(p.partial_o + 4 * ((part + mine) * kValuePitch + whole));
        if (mode != kMarks) {
          const float l = sums[mine].y;
          const auto finite = [](float x) { return fabsf(x) <= 3.402823466e38f; };
          odd |= l == l && !(finite(sum.x) && finite(sum.y) && finite(sum.z) && finite(sum.w));
          // Whether a zero came from hidden keys must not show in its sign.
          sum = make_float4(sum.x * kWeightUnit + 0.0f, sum.y * kWeightUnit + 0.0f,
                            sum.z * kWeightUnit + 0.0f, sum.w * kWeightUnit + 0.0f);
        }
        if (mode == kFinite) {
          const float4 marks = *place;
          if (marks.x != 0) sum.x += marks.x;
          if (marks.y != 0) sum.y += marks.y;
          if (marks.z != 0) sum.z += marks.z;
          if (marks.w != 0) sum.w += marks.w;
        }
        *place = sum;
      }
      found |= __syncthreads_or(odd) != 0;
    }
  }
  return found;
}

// Of a row's sub-splits first to first + n - 1: the state, with o of four columns.
struct Sum {
  float2 ml;
  float4 o;
};
DEVICE Sum sum_subs(const Params& p, uint64 part, uint step, int n, int column) {
  constexpr int kAhead = kSubs < 8 ? kSubs : 8;  // loaded together
  Sum sum = {make_float2(kHidden, 0), make_float4(0, 0, 0, 0)};
  float2 ml[kSubs];
#pragma unroll
  for (int i = 0; i < kSubs; ++i) {
    ml[i] = make_float2(kHidden, -1);
    if (i < n) ml[i] = __ldcg(reinterpret_cast<const float2*>(p.partial_ml) + part + i * step);
  }
#pragma unroll
  for (int i = 0; i < kSubs; ++i) sum.ml.x = max_or_nan(sum.ml.x, ml[i].x);
  const float base = base_of(sum.ml.x);
#pragma unroll
  for (int i = 0; i < kSubs; ++i) {
    const float factor = ml[i].y < 0 ? 0.0f : factor_of(ml[i].x, base);
    if (factor != 0) sum.ml.y = fmaf(ml[i].y, factor, sum.ml.y);
    ml[i].x = factor;
  }
  if (sum.ml.y == 0) sum.ml = make_float2(kHidden, -1);
  if (column < 0) return sum;
#pragma unroll
  for (int i0 = 0; i0 < kSubs; i0 += kAhead) {
    float4 o[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      o[i] = make_float4(0, 0, 0, 0);
      if (i0 + i >= n) continue;
      o[i] = __ldcg(reinterpret_cast<const float4*>(
          p.partial_o + 4 * ((part + (i0 + i) * step) * kValuePitch + column)));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const float factor = ml[i0 + i].x;
      if (factor == 0) continue;  // as 0 times its Inf or NaN would be NaN
      sum.o = make_float4(fmaf(o[i].x, factor, sum.o.x), fmaf(o[i].y, factor, sum.o.y),
                          fmaf(o[i].z, factor, sum.o.z), fmaf(o[i].w, factor, sum.o.w));
    }
  }
  return sum;
}

// Folds a later partial state into `state`; (keep, add) are the factors that were used.
DEVICE float2 fold_ml(float2& state, float2 later) {
  const bool same = later.y < 0 || state.x > later.x || state.x != state.x;
  const float most = same ? state.x : later.x, base = base_of(most);
  const float keep = factor_of(state.x, base), add = factor_of(later.x, base);
  if (later.y < 0 || add == 0) return make_float2(1, 0);
  state = make_float2(most, keep == 0 ? later.y : fmaf(later.y, add, state.y * keep));
  return make_float2(keep, add);
}
DEVICE float fold_o(float state, float later, float2 factors) {
  if (factors.y == 0) return state;
  return factors.x == 0 ? later : fmaf(later, factors.y, state * factors.x);
}
DEVICE float4 fold_o(float4 state, float4 later, float2 factors) {
  return make_float4(fold_o(state.x, later.x, factors), fold_o(state.y, later.y, factors),
                     fold_o(state.z, later.z, factors), fold_o(state.w, later.w, factors));
}

extern "C" __global__ void __launch_bounds__(kThreads, KF_BLOCKS)
    decode(const __grid_constant__ Params p, const __grid_constant__ Work work) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint base = shared_address(shared);
  const uint warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint stream = warp / kTeam, member = warp % kTeam, team_lane = member * 32 + lane;
  const uint row_member = member / kColumnTeam, column_member = member % kColumnTeam;
  const auto team_sync = [&] {
    if (kTeam == 1) {
      __syncwarp();
    } else {
      named_sync(1 + stream, 32 * kTeam);
    }
  };
  if (kPadded || (kQueryShared && kHeadPitch != kHeadDim)) {
    for (uint i = threadIdx.x; i < kBufferAt / 16; i += kThreads) {
      reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }

  // Copies run kSlots - 1 slots ahead of what is used.
  Cursor c = begin_of(p, work, stream, lane);
  if (c.left == 0) return;
  Cursor ahead = c;
  const uint ring = base + stream * kSlots * kSlotBytes, ring_end = ring + kSlots * kSlotBytes;
  uint fill, take;
  const auto seek = [&] {
    while (ahead.left != 0 && ahead.step == ahead.end) advance(p, ahead, stream);
  };
  const auto next = [&](uint& slot) {
    slot += kSlotBytes;
    if (slot == ring_end) slot = ring;
  };
  const auto fill_keys = [&] {
    if (ahead.left != 0) {
      copy_rows<HeadTile>(fill, p.k + ahead.batch * p.k_batch + ahead.head * p.k_head, p.k_key,
                          key_of(p, ahead, stream, ahead.step), ahead.seen.limit, team_lane);
    }
    copies_commit();
    __syncwarp();  // where some lanes had nothing to copy
    next(fill);
  };
  const auto fill_values = [&] {
    if (ahead.left != 0) {
      copy_rows<ValueTile>(fill, p.v + ahead.batch * p.v_batch + ahead.head * p.v_head, p.v_key,
                           key_of(p, ahead, stream, ahead.step), ahead.seen.limit, team_lane);
      ++ahead.step;
      seek();
    }
    copies_commit();
    __syncwarp();  // where some lanes had nothing to copy
    next(fill);
  };
  const auto begin_copies = [&] {
    fill = take = ring;
    seek();
#pragma unroll 1
    for (int i = 0; i < (kSlots - 1) / 2; ++i) {
      fill_keys();
      fill_values();
    }
    if (kSlots % 2 == 0) fill_keys();
  };
  begin_copies();

  const uint near = lane / 8 % 2 * 8 + lane % 8, far = lane / 16 * 8 + lane % 8;
  const MatrixRows<HeadTile> query_rows(near, lane / 16), key_rows(far, lane / 8 % 2);
  const MatrixRows<ValueTile> value_rows(near, lane / 16);
  const uint columns = column_member * kColumns, g = lane / 4, t = lane % 4;
  uint q[kQueryShared ? 1 : kHeadDim / 16][4];
  const auto query = [&](int i, uint(&a)[4]) {
    if (kQueryShared) {
      load_matrices(a, query_rows(base + kQueryAt + 16 * row_member * HeadTile::kPitch, i, 0));
    } else {
      for (int e = 0; e < 4; ++e) a[e] = q[kQueryShared ? 0 : i][e];
    }
  };
  Fold fold;
  uint group = ~0u, tile = 0;  // whose q is here
#pragma unroll 1
  for (; c.left != 0; advance(p, c, stream)) {
    const uint first = tile_first(p, c.tile), last = tile_last(p, c.tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows beyond the last are computed as this, and not written.
      const uint index = min(first + 16 * row_member + g + 8 * r, last);
      fold.range[r] = visible(c.seen, index / p.heads);
#if KF_MASK
      const uint head = c.head * p.heads + index % p.heads;
      fold.mask[r] =
          p.mask + c.batch * p.mask_batch + head * p.mask_head + index / p.heads * p.mask_row;
#endif
    }
    fold.full_begin = visible(c.seen, last / p.heads).x;
    fold.full_end = visible(c.seen, first / p.heads).y;
    if (group != c.group || tile != c.tile) {
      group = c.group;
      tile = c.tile;
      const uint64 from = p.q + 2 * kHeadPitch * state_index(p, group, 0);
      if (kQueryShared) {
        constexpr uint kWords = HeadTile::kMemoryWords;
        for (uint i = threadIdx.x; i < kRows * kWords; i += kThreads) {
          const uint row = i / kWords, word = i % kWords;
          const uint swizzled = HeadTile::kSwizzled ? word ^ (row & 7) : word;
          *reinterpret_cast<uint4*>(shared + kQueryAt + row * HeadTile::kPitch + 16 * swizzled) =
              *reinterpret_cast<const uint4*>(from + 2 * kHeadPitch * min(first + row, last) +
                                              16 * word);
        }
        __syncthreads();
      } else {
#pragma unroll
        for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint index = min(first + 16 * row_member + g + e % 2 * 8, last);
            const int column = 16 * i + e / 2 * 8;
            q[kQueryShared ? 0 : i][e] = 0;
            if (column >= kHeadPitch) continue;
            q[kQueryShared ? 0 : i][e] =
                *reinterpret_cast<const uint*>(from + 2 * (kHeadPitch * index + column + 2 * t));
          }
        }
      }
    }

#pragma unroll 1
    for (Mode mode = kFast;;) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        fold.m[r] = kHidden;
        fold.t[r] = 0;
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) fold.o[j][e] = 0;
      }
#pragma unroll 1
      for (int step = c.step; step < c.end; ++step) {
        const int key = key_of(p, c, stream, step);
        float s[kKeyBlocks][4], bias[kKeyBlocks][4];
        if (KF_MASK) load_masks(fold, p, key, lane, bias);
        copies_wait<kSlots - 2>();
        team_sync();
        if (kSlots % 2 == 0) {
          fill_values();
        } else {
          fill_keys();
        }
        multiply_keys(s, query,
                      [&](int i, int n, uint(&x)[4]) { load_matrices(x, key_rows(take, i, n)); });
        next(take);
        soften(fold, p, key, lane, mode, s, bias);
        copies_wait<kSlots - 2>();
        team_sync();
        if (kSlots % 2 == 0) {
          fill_keys();
        } else {
          fill_values();
        }
        if (mode != kFast) {
          transform_values(shared + (take - base), mode, team_lane);
          team_sync();
        }
        const uint values = take + 2 * columns;
        multiply_values(fold, s, mode, [&](int i, int n, uint(&x)[4]) {
          load_transposed(x, value_rows(values, i, n));
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

// Merges a row's partial states: those of a split at once, splits in ascending order into the
// state. Warps take splits in turn; a block has a row (x) of a group (y).
constexpr int kMostWarps = 16;
extern "C" __global__ void __launch_bounds__(32 * kMostWarps)
    decode_merge(const __grid_constant__ Params p) {
  __shared__ float4 shared_o[kMostWarps][32];
  __shared__ float2 shared_ml[kMostWarps];
  const uint warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const uint group = p.group + blockIdx.y, index = p.index_begin + blockIdx.x;
  const int2 subs = subs_of(p, batch_at(p, group / p.kv_heads));
  if (subs.x == subs.y) return;
  const uint step = p.index_end - p.index_begin;
  const uint64 state = state_index(p, group, index);
  float2* const state_ml = reinterpret_cast<float2*>(p.ml) + state;
  const int split_begin = subs.x / kSubs, split_end = (subs.y - 1) / kSubs + 1;
  const float2 before = *state_ml;
#pragma unroll 1
  for (int column = 4 * lane; column - 4 * int(lane) < kValuePitch; column += 128) {
    float4* const place = reinterpret_cast<float4*>(p.o + 4 * (state * kValuePitch + column));
    float2 ml = before;
    float4 o = make_float4(0, 0, 0, 0);
    if (warp == 0 && column < kValuePitch) o = *place;
#pragma unroll 1
    for (int s = split_begin; s < split_end; s += warps) {
      const int split = s + warp;
      if (split < split_end) {
        const int begin = max(subs.x, split * kSubs), end = min(subs.y, (split + 1) * kSubs);
        const Sum sum = sum_subs(p, partial_index(p, group, begin, index), step, end - begin,
                                 min(column, kValuePitch - 4));
        shared_o[warp][lane] = sum.o;
        if (lane == 0) shared_ml[warp] = sum.ml;
      }
      __syncthreads();
      if (warp == 0) {
        for (int i = 0; i < min(int(warps), split_end - s); ++i) {
          const float2 factors = fold_ml(ml, shared_ml[i]);
          o = fold_o(o, shared_o[i][lane], factors);
        }
      }
      __syncthreads();
    }
    if (warp == 0 && column < kValuePitch) *place = o;
    if (threadIdx.x == 0 && column + 128 >= kValuePitch) *state_ml = ml;
  }
}

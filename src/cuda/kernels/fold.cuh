// What prefill kernels on matrix units share: jobs, scores, and the fold of tiles of keys into a
// row's state (m, l, o). A warp holds 16 rows: of a product of matrices thread t of a group g of
// four holds two neighbouring columns of rows g and g + 8, as wgmma and mma.sync both have it:
//   element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 t + e
//
// The fold goes on from the state in memory, tile of keys after tile of keys, counted from key 0,
// so that the end of a chunk changes nothing. Tiles that no row sees would change nothing either,
// and are left out.
//
// Inf and NaN of V have no place in a product, where 0 times them would be NaN. Where the output is
// not finite, the state stays as it is and the job is left to the same kernel with KEYFOLD_CAREFUL,
// which meets the keys four times: with 1 where V is Inf, -Inf, NaN, and then with the rest of V.
#pragma once

#include "scores.cuh"

constexpr bool kCareful = KEYFOLD_CAREFUL;
constexpr i32 kKeys = KEYFOLD_KEYS;  // of a tile
static_assert(kSplitLen % kKeys == 0, "as in kernel_shape.hpp");
constexpr i32 kPasses = kCareful ? 4 : 1;  // 1, 2, 3 look for Inf, -Inf, NaN; 0 comes last

// Weights are taken times 2^kWeightBits: float16 holds those down to 2^-39.
constexpr float kWeightBits = kDType == 1 ? 15.0f : 0.0f;
constexpr float kWeightUnit = kDType == 1 ? 1.0f / 32768.0f : 1.0f;

// --- Jobs ---------------------------------------------------------------------------------------

// What a launch works on.
struct Jobs {
  u64 redo;    // u32 [groups][tiles]: whether the careful kernel has to
  u32 groups;  // of the chunk
  u32 tiles;   // of rows, in each
};

// One tile of rows of one group, and the tiles of keys that it meets.
struct Job {
  u32 group, first;  // absolute; index of the first row
  u32 batch, kv_head;
  i32 begin, end;  // tiles of keys
  Range full;      // keys that all its rows see
  Batch seen;
  u64 redo;  // its flag
  bool skip;
};

// The i-th job of this block; false behind the last. Jobs with many keys begin first, and every
// second round goes the other way, so that all blocks get about the same work.
template <u32 kRows>
KEYFOLD_INLINE bool job_of(const Params& p, const Jobs& jobs, u32 i, Job& job) {
  const u32 within = i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const u32 at = i * gridDim.x + within;
  job.skip = at >= jobs.groups * jobs.tiles;
  if (job.skip) return i * gridDim.x < jobs.groups * jobs.tiles;
  const u32 tile = jobs.tiles - 1 - at / jobs.groups, group = at % jobs.groups;
  job.group = p.group + group;
  job.first = p.index_begin + tile * kRows;
  job.batch = job.group / p.kv_heads;
  job.kv_head = job.group % p.kv_heads;
  job.seen = load_batch(p, job.batch);
  job.redo = jobs.redo + 4 * (group * jobs.tiles + tile);
  const u32 last = smaller(job.first + kRows, p.index_end) - 1;
  const Range early = visible(job.seen, job.first / p.heads),
              late = visible(job.seen, last / p.heads);
  job.begin = early.begin / kKeys;
  job.end = (late.end + kKeys - 1) / kKeys;
  job.full = {late.begin, early.end};
  job.skip = early.begin >= late.end || (kCareful && load_word(job.redo) == 0);
  return true;
}

// --- The fold -----------------------------------------------------------------------------------

// Of the two rows of a thread.
struct Sums {
  float m[2], l[2];
  float t[2];  // this thread's part of l since the last split's end
};

// Beyond this a maximum's product with log2(e) is too coarse to take scores against, or overflows.
constexpr float kFar = 2048.0f;
KEYFOLD_INLINE bool is_far(float m) { return kDType != 0 && fabsf(base_of(m)) > kFar; }

// exp(s * unit - base), times 2^kWeightBits.
KEYFOLD_INLINE float weight_of(float s, float unit, float base, bool far) {
  if constexpr (kDType == 0) return exp_nonpositive(s * unit - base);
  return exp2_fast(far ? (s * unit - base) * kLog2e + kWeightBits
                       : fmaf(s, unit * kLog2e, kWeightBits - base * kLog2e));
}
// exp(before - base). It is 1, to the bit, where both are the same: in no case is a product of one
// rounded and of the other not.
KEYFOLD_INLINE float factor_of(float before, float base, bool far) {
  if constexpr (kDType == 0) return exp_nonpositive(before - base);
  return exp2_fast(far ? (before - base) * kLog2e : before * kLog2e - base * kLog2e);
}

// Scores become weights, in place, against the maxima `most`; kAnyFar: some may be far.
template <bool kAnyFar>
KEYFOLD_INLINE void weigh(float (&s)[kKeys / 2], Sums& c, const float (&most)[2], float unit,
                          float (&alpha)[2]) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const float base = base_of(most[r]);
    const bool far = kAnyFar && is_far(base);
    alpha[r] = factor_of(c.m[r], base, far);
    c.m[r] = most[r];
    float sum[2] = {c.t[r] * alpha[r], 0.0f};
#pragma unroll
    for (u32 i = 2 * r; i < kKeys / 2; i += 4) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        s[i + e] = weight_of(s[i + e], unit, base, far);
        sum[e] += s[i + e];
      }
    }
    c.l[r] *= alpha[r];
    c.t[r] = sum[0] + sum[1];
  }
}

// Of row r of a thread's two.
KEYFOLD_INLINE float row_maximum(const float (&s)[kKeys / 2], u32 r) {
  float x[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
  for (u32 i = 4; i < kKeys / 2; i += 4) {
    x[0] = fmaxf(x[0], s[i + 2 * r]);
    x[1] = fmaxf(x[1], s[i + 2 * r + 1]);
  }
  return quad_max(fmaxf(x[0], x[1]));
}

// Scores of blocks of 16 rows become weights, in place; `alpha`: the factors of what was before.
template <i32 kBlocks>
KEYFOLD_INLINE void softmax(float (&s)[kBlocks][kKeys / 2], Sums (&c)[kBlocks], const Params& p,
                            float (&alpha)[kBlocks][2]) {
  const float unit = kFinished ? 1.0f : p.scale;
  float most[kBlocks][2];
  bool far = false;
#pragma unroll
  for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      most[b][r] = fmaxf(c[b].m[r], row_maximum(s[b], r) * unit);
      far = far || is_far(most[b][r]);
    }
  }
  if (kDType != 0 && __any_sync(~0u, far)) {
#pragma unroll
    for (i32 b = 0; b < kBlocks; ++b) weigh<true>(s[b], c[b], most[b], unit, alpha[b]);
  } else {
#pragma unroll
    for (i32 b = 0; b < kBlocks; ++b) weigh<false>(s[b], c[b], most[b], unit, alpha[b]);
  }
}

// At every split's end, by its absolute position.
KEYFOLD_INLINE void close_split(Sums& c) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    c.l[r] += quad_sum(c.t[r]);
    c.t[r] = 0.0f;
  }
}

// --- Inf and NaN --------------------------------------------------------------------------------

// What passes after 0 see of a weight is whether it is there, and of a factor whether it is not 0.
KEYFOLD_INLINE float seen_in(i32 pass, float x) {
  return kCareful && pass != 0 ? (x != 0.0f ? 1.0f : 0.0f) : x;
}

// Whether what was before has no weight any more: a sum that has overflowed vanishes too.
KEYFOLD_INLINE bool vanished(float alpha) { return kCareful && alpha == 0.0f; }

// A word of V as a pass needs it: see the head of the file.
KEYFOLD_INLINE u32 value_for(i32 pass, u32 word) {
  constexpr u32 kBits = kDType == 0 ? 32 : 16, kSign = 1u << (kBits - 1);
  constexpr u32 kInfinity = kDType == 0 ? 0x7f800000u : (kDType == 1 ? 0x7c00u : 0x7f80u);
  constexpr u32 kOne = kDType == 0 ? 0x3f800000u : (kDType == 1 ? 0x3c00u : 0x3f80u);
  u32 result = 0;
  for (u32 shift = 0; shift < 32; shift += kBits) {
    const u32 x = word >> shift & (kSign | (kSign - 1)), magnitude = x & (kSign - 1);
    const u32 finite = magnitude < kInfinity ? x : 0;
    const bool odd =
        pass == 3 ? magnitude > kInfinity : x == (pass == 1 ? kInfinity : kInfinity | kSign);
    result |= (pass == 0 ? finite : odd ? kOne : 0) << shift;
  }
  return result;
}

// What o has of Inf, -Inf, NaN: bits 1, 2, 3.
template <u32 n>
struct Marks {
  u32 of[kCareful ? n : 1] = {};
};
template <u32 n>
KEYFOLD_INLINE void mark_values(const float (&o)[n], Marks<n>& marks, i32 pass) {
#pragma unroll
  for (u32 i = 0; i < n; ++i) marks.of[i] |= o[i] > 0.0f ? 1u << pass : 0;
}
template <u32 n>
KEYFOLD_INLINE void apply_marks(float (&o)[n], const Marks<n>& marks) {
#pragma unroll
  for (u32 i = 0; i < n; ++i) {
    if (marks.of[i] != 0)
      o[i] += marks.of[i] == 2 ? -hidden() : marks.of[i] == 4 ? hidden() : nan();
  }
}
template <u32 n>
KEYFOLD_INLINE bool all_finite(const float (&o)[n]) {
  bool finite = true;
#pragma unroll
  for (u32 i = 0; i < n; ++i) finite = finite && is_finite(o[i]);
  return finite;
}

// --- The state in memory ------------------------------------------------------------------------

// A thread's two rows of the state.
struct Places {
  u64 state[2];
  bool inside[2];
};
KEYFOLD_INLINE Places places_of(const Params& p, const Job& job, u32 row) {
  Places at;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const u32 index = job.first + row + 8 * r;
    at.inside[r] = index < p.index_end;
    at.state[r] = state_index(p, job.group, smaller(index, p.index_end - 1));
  }
  return at;
}

KEYFOLD_INLINE void load_sums(Sums& c, const Params& p, const Places& at) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const float2 ml = read_float2(p.ml + 8 * at.state[r]);
    c.m[r] = ml.x;
    c.l[r] = ml.y * (1.0f / kWeightUnit);
    c.t[r] = 0.0f;
  }
}
KEYFOLD_INLINE void store_sums(const Sums& c, const Params& p, const Places& at) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    if (!at.inside[r]) continue;
    // A NaN score, or one of +Inf: the row stays NaN whatever it is merged with.
    write(p.ml + 8 * at.state[r], float2{is_nan(c.l[r]) ? nan() : c.m[r], c.l[r] * kWeightUnit});
  }
}

// Where o's elements lie: vector v of them has kWidth neighbouring columns of row g + 8 (v % 2).
struct Pairs {  // of products with V's columns in their order
  static constexpr u32 kWidth = 2;
  static KEYFOLD_INLINE constexpr u32 element(u32 v, u32 x) { return 2 * v + x; }
  static KEYFOLD_INLINE constexpr u32 column(u32 v, u32 lane) { return 8 * (v / 2) + lane % 4 * 2; }
};
struct Quads {  // where column 32 i + 4 g + j of V stands at n = g of product j of four
  static constexpr u32 kWidth = 4;
  static KEYFOLD_INLINE constexpr u32 element(u32 v, u32 x) {
    return 16 * (v / 4) + 4 * x + 2 * (v % 2) + v / 2 % 2;
  }
  static KEYFOLD_INLINE constexpr u32 column(u32 v, u32 lane) {
    return 32 * (v / 4) + lane % 4 * 8 + v / 2 % 2 * 4;
  }
};

// o of the two rows, of columns from `first` on; zeros where a row has seen no key.
template <class Layout, u32 n>
KEYFOLD_INLINE void load_values(float (&o)[n], const Sums& c, const Params& p, const Places& at,
                                u32 first, u32 lane) {
#pragma unroll
  for (u32 v = 0; v < n / Layout::kWidth; ++v) {
    const u32 column = first + Layout::column(v, lane), r = v % 2;
    float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
    if (c.l[r] != 0.0f && column < kValueDim) {
      const u64 place = p.o + 4 * (at.state[r] * kValueDim + column);
      if constexpr (Layout::kWidth == 4) {
        x = read_float4(place);
      } else {
        const float2 y = read_float2(place);
        x.x = y.x, x.y = y.y;
      }
    }
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (u32 e = 0; e < Layout::kWidth; ++e) {
      o[Layout::element(v, e)] = values[e] * (1.0f / kWeightUnit);
    }
  }
}
template <class Layout, u32 n>
KEYFOLD_INLINE void store_values(const float (&o)[n], const Params& p, const Places& at, u32 first,
                                 u32 lane) {
#pragma unroll
  for (u32 v = 0; v < n / Layout::kWidth; ++v) {
    const u32 column = first + Layout::column(v, lane), r = v % 2;
    if (!at.inside[r] || column >= kValueDim) continue;
    float x[4];
#pragma unroll
    for (u32 e = 0; e < Layout::kWidth; ++e) {
      x[e] = positive_zero(o[Layout::element(v, e)] * kWeightUnit);
    }
    const u64 place = p.o + 4 * (at.state[r] * kValueDim + column);
    if constexpr (Layout::kWidth == 4) {
      write(place, float4{x[0], x[1], x[2], x[3]});
    } else {
      write(place, float2{x[0], x[1]});
    }
  }
}

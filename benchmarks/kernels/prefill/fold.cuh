// What prefill kernels share: jobs, the keys that a row sees, scores, and the fold of tiles of keys
// into a row's state (m, l, o). A warp holds 16 rows: of products of matrices thread t of a group
// of four holds columns 2t and 2t + 1 of rows g and g + 8, as wgmma and mma.sync both have it:
//   element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 t + e.
//
// Set by the host: KF_FLOAT32 or KF_BFLOAT16 or neither (float16), KF_SPLIT_LEN, KF_MASK (0 none,
// 1 bool, 2 float32, 3 float16, 4 bfloat16), KF_SOFTCAP, KF_FINISHED (scores are not only scaled),
// KF_VALUE_PITCH (floats of a row of the state), KF_CAREFUL.
#pragma once
#include "params.cuh"
#include "types.cuh"

#ifdef KF_FLOAT32
constexpr bool kFloat32 = true;
#else
constexpr bool kFloat32 = false;
#endif
#if defined(KF_FLOAT32) || defined(KF_BFLOAT16)
constexpr float kWeightBits = 0, kWeightUnit = 1;
#else
constexpr float kWeightBits = 15, kWeightUnit = 1.0f / 32768;  // float16: weights down to 2^-39
#endif
constexpr int kPasses = KF_CAREFUL ? 4 : 1;
constexpr float kLog2e = 1.44269504f;
#define kHidden __int_as_float(0xff800000)

// What a launch works on: tiles of rows of each group of the chunk.
struct Tiles {
  uint groups, count;  // groups of the chunk; tiles of rows of each
  uint* redo;          // [groups][count][flags]: whether the careful kernel has to
};

// --- Arithmetic -------------------------------------------------------------------------------

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The same by the multiply-add units, which have time left; -inf gives 0, and NaN stays.
DEVICE float exp2_polynomial(float x) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-127.0f));
  const float shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  float p = fmaf(5.5503324e-2f, r, 2.4022651e-1f);
  p = fmaf(p, r, 6.9314718e-1f);
  p = fmaf(p, r, 1.0f);
  return p * __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// exp(x) for x <= 0, as on the CPU: at most 2 ulp; below the normal range 0; NaN gives NaN.
DEVICE float exp_nonpositive(float x) {
  const float shifted = fmaf(x, 1.44269502f, 12582912.0f);  // rounds to an integer in the low bits
  const float n = __fadd_rn(shifted, -12582912.0f);
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.3926184e-3f;
  p = fmaf(p, r, 8.36317893e-3f);
  p = fmaf(p, r, 4.16665561e-2f);
  p = fmaf(p, r, 1.66665763e-1f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  const float y = p * __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return x < -87.3365402f ? 0.0f : y;
}
// tanh with an error of at most 4 ulp: an odd polynomial near 0, else (1 - e) / (1 + e).
DEVICE float tanh_precise(float x) {
  const float a = fabsf(x), z = x * x;
  float p = -6.09671418e-3f;
  p = fmaf(p, z, 2.09971797e-2f);
  p = fmaf(p, z, -5.38509078e-2f);
  p = fmaf(p, z, 1.33327693e-1f);
  p = fmaf(p, z, -3.33333284e-1f);
  const float small = fmaf(p, x * z, x);
  const float e = exp_nonpositive(-2.0f * a);
  const float quotient = __fdiv_rn(1.0f - e, 1.0f + e);
  return a < 0.625f ? small : x < 0.0f ? -quotient : quotient;  // NaN takes the quotient
}
// tanh for scores of 16-bit products; for a large argument 1 - 2 / inf.
DEVICE float tanh_fast(float x) { return 1 - 2 * reciprocal(1 + exp2_fast(x * (2 * kLog2e))); }
DEVICE uint pack(float low, float high) {
  uint r;
#ifdef KF_BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// --- Jobs -------------------------------------------------------------------------------------

// One tile of rows of one group, and the tiles of keys that it meets.
struct Job {
  uint group, first;  // absolute; index of its first row
  uint batch, kv_head;
  int begin, end;            // tiles of keys
  int full_begin, full_end;  // keys that all its rows see
  Batch seen;
  bool skip;
};

// The keys that a row of the block sees, before masks: [x, y).
DEVICE int2 visible(const Batch& b, int row) {
  const int end = max(0, min(b.limit, b.last + row));
  return make_int2(min(max(b.first + row, 0), end), end);
}

template <int kRows, int kFlags>
DEVICE uint* redo_of(const Params& p, const Tiles& tiles, const Job& job) {
  const uint tile = (job.first - p.index_begin) / kRows;
  return tiles.redo + ((job.group - p.group) * tiles.count + tile) * kFlags;
}

// The i-th job of this block, and of the others of its cluster, which take neighbouring tiles of
// rows and meet the same tiles of keys. Jobs with many keys begin first, and every second round
// goes the other way, so that all blocks get about the same work. `kFlags`: of redo, of a tile of
// rows.
template <int kRows, int kKeys, int kFlags, int kCluster = 1>
DEVICE bool job_of(const Params& p, const Tiles& tiles, uint i, Job& job) {
  const uint clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster;
  const uint within = i % 2 ? clusters - 1 - cluster : cluster;
  const uint at = i * clusters + within, count = tiles.count / kCluster;
  if (at >= tiles.groups * count) {
    job.skip = true;
    return i * clusters < tiles.groups * count;
  }
  const uint tile = (count - 1 - at / tiles.groups) * kCluster;  // the cluster's first
  job.group = p.group + at % tiles.groups;
  job.first = p.index_begin + (tile + blockIdx.x % kCluster) * kRows;
  job.batch = job.group / p.kv_heads;
  job.kv_head = job.group % p.kv_heads;
  job.seen = reinterpret_cast<const Batch*>(p.batches)[job.batch];
  const auto seen_by = [&](uint index) {
    return visible(job.seen, min(index, p.index_end - 1) / p.heads);
  };
  const uint cluster_first = p.index_begin + tile * kRows;
  const int2 early = seen_by(cluster_first);
  const int2 late = seen_by(cluster_first + kCluster * kRows - 1);
  job.begin = early.x / kKeys;
  job.end = (late.y + kKeys - 1) / kKeys;
  job.full_begin = kCluster == 1 ? late.x : seen_by(job.first + kRows - 1).x;
  job.full_end = kCluster == 1 ? early.y : seen_by(job.first).y;
  job.skip = early.x >= late.y;
#if KF_CAREFUL
  const uint* const redo = tiles.redo + ((job.group - p.group) * tiles.count + tile) * kFlags;
  uint any = 0;
  for (int flag = 0; flag < kFlags * kCluster; ++flag) any |= redo[flag];
  if (!any) job.skip = true;
#endif
  return true;
}

// --- Scores -----------------------------------------------------------------------------------

// What the two rows of a thread see of the keys.
struct Limits {
  int2 range[2];
  uint64 mask[2];  // of the row, the chunk's first key
};

DEVICE uint64 mask_of(const Params& p, const Job& job, uint index) {
  const uint head = job.kv_head * p.heads + index % p.heads;
  return p.mask + job.batch * p.mask_batch + head * p.mask_head + (index / p.heads) * p.mask_row;
}

DEVICE float mask_value(uint64 address) {
#if KF_MASK == 1
  return *reinterpret_cast<const unsigned char*>(address) ? 0.0f : kHidden;
#elif KF_MASK == 2
  return *reinterpret_cast<const float*>(address);
#elif KF_MASK >= 3
  const uint bits = *reinterpret_cast<const unsigned short*>(address);
  float x;
  if (KF_MASK == 4) return __uint_as_float(bits << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<unsigned short>(bits)));
  return x;
#else
  return 0;
#endif
}

// A product as a score, where it is not only scaled. What a mask hides stays hidden, be it NaN.
DEVICE float finish(float product, const Params& p, uint64 mask, int key) {
  float s = product * p.scale;
#if KF_SOFTCAP
  s = p.softcap * (kFloat32 ? tanh_precise(s) : tanh_fast(s));
#endif
#if KF_MASK
  const float bias = mask_value(mask + int64(key) * p.mask_key);
  s = bias == kHidden ? kHidden : KF_MASK == 1 ? s : s + bias;
#endif
  return s;
}

// Whether scores of tile n have to be looked at one by one.
template <int kKeys>
DEVICE bool unfinished(const Job& job, int n) {
  return KF_FINISHED || n * kKeys < job.full_begin || (n + 1) * kKeys > job.full_end;
}

// Hides and finishes scores of tile n.
template <int kScores>
DEVICE void finish_scores(float (&s)[kScores], const Limits& limits, const Params& p, int n,
                          uint lane) {
  const int first = n * (2 * kScores) + 2 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int key = first + i / 4 * 8 + i % 2, r = i / 2 % 2;
    const bool hidden = key < limits.range[r].x || key >= limits.range[r].y;
    if (hidden) {
      s[i] = kHidden;
    } else if (KF_FINISHED) {
      s[i] = finish(s[i], p, limits.mask[r], key);
    }
  }
}

// --- The fold ---------------------------------------------------------------------------------

// Of the two rows of a thread.
struct Sums {
  float m[2];  // the greatest score
  float l[2];  // of weights, up to the last split's end
  float t[2];  // this thread's part of what was added since
};

// Scores to weights in place; alpha: the factors of what was before. Where m does not change alpha
// is 1, to the bit: the rounded bases are subtracted, with no fma. So tiles that a row sees nothing
// of change nothing. kEmulate: exp2_polynomial() for some of each kEmulate columns.
template <int kEmulate = 0, int kScores>
DEVICE void softmax(float (&s)[kScores], Sums& c, const Params& p, float (&alpha)[2]) {
  const float unit = KF_FINISHED ? 1.0f : p.scale;
  const float log2e = kFloat32 ? 1.0f : kLog2e, exponent = unit * log2e;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float mosts[2] = {s[2 * r], s[2 * r + 1]};
#pragma unroll
    for (int j = 1; j < kScores / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) mosts[e] = fmaxf(mosts[e], s[4 * j + 2 * r + e]);
    }
    const float most = fmaxf(c.m[r], quad_max(fmaxf(mosts[0], mosts[1])) * unit);
    const float base = most == kHidden ? 0.0f : __fmul_rn(most, log2e);
    const float change = __fsub_rn(__fmul_rn(c.m[r], log2e), base), shift = kWeightBits - base;
    alpha[r] = kFloat32 ? exp_nonpositive(change) : exp2_fast(change);
    c.m[r] = most;
    float sums[2] = {c.t[r] * alpha[r], 0};
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float y = fmaf(s[4 * j + 2 * r + e], exponent, shift);
        const bool emulate = kEmulate && j % (kEmulate | 1) == 1;
        const float x = kFloat32 ? exp_nonpositive(y) : emulate ? exp2_polynomial(y) : exp2_fast(y);
        s[4 * j + 2 * r + e] = x;
        sums[e] += x;
      }
    }
    c.l[r] *= alpha[r];
    c.t[r] = sums[0] + sums[1];
  }
}

// At every split's end, by its absolute position: so a chunk's end changes no bit.
DEVICE void close_split(Sums& c) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    c.l[r] += quad_sum(c.t[r]);
    c.t[r] = 0;
  }
}

// A weight that meets V's indicators of Inf and NaN.
DEVICE float pass_weight(float x, int pass) { return pass == 0 ? x : x != 0 ? 1.0f : 0.0f; }

// Weights as the left side of products.
template <int kScores>
DEVICE void pack_weights(const float (&s)[kScores], uint (&w)[kScores / 2], int pass) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    w[i] = pack(KF_CAREFUL ? pass_weight(s[2 * i], pass) : s[2 * i],
                KF_CAREFUL ? pass_weight(s[2 * i + 1], pass) : s[2 * i + 1]);
  }
}

#if KF_CAREFUL
// One word of V for a pass: itself without Inf and NaN; or 1 where it is Inf, -Inf, NaN, and else
// 0.
DEVICE uint pass_value(uint word, int pass) {
#ifdef KF_FLOAT32
  const int bits = 32;
  const uint infinity = 0x7f800000u, one = 0x3f800000u;
#elif defined(KF_BFLOAT16)
  const int bits = 16;
  const uint infinity = 0x7f80u, one = 0x3f80u;
#else
  const int bits = 16;
  const uint infinity = 0x7c00u, one = 0x3c00u;
#endif
  const uint sign = 1u << (bits - 1);
  uint result = 0;
  for (int at = 0; at < 32; at += bits) {
    const uint x = word >> at & (sign | (sign - 1)), magnitude = x & (sign - 1);
    uint y;
    if (pass == 0) {
      y = magnitude >= infinity ? 0 : x;
    } else if (pass == 3) {
      y = magnitude > infinity ? one : 0;
    } else {
      y = x == (pass == 1 ? infinity : infinity | sign) ? one : 0;
    }
    result |= y << at;
  }
  return result;
}
// Puts in V's place in shared memory what the pass needs. The caller synchronises.
template <int kThreads>
DEVICE void transform_values(uint address, uint bytes, int pass, uint thread) {
  for (uint at = address + 4 * thread; at < address + bytes; at += 4 * kThreads) {
    uint word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pass_value(word, pass)) : "memory");
  }
}
#endif

// --- The state in memory ----------------------------------------------------------------------

// Where o's elements lie: vector v of them has kWidth neighbouring columns of row g + 8 (v % 2).
struct Pairs {  // of products with V's columns in their order
  static constexpr int kWidth = 2;
  using Vector = float2;
  static __device__ __forceinline__ constexpr int element(int v, int x) { return 2 * v + x; }
  static __device__ __forceinline__ constexpr int column(int v, uint lane) {
    return 8 * (v / 2) + 2 * (lane % 4);
  }
};
struct Quads {  // where column 32 i + 4 g + j of V stands at n = g of product j of four
  static constexpr int kWidth = 4;
  using Vector = float4;
  static __device__ __forceinline__ constexpr int element(int v, int x) {
    return 16 * (v / 4) + 4 * x + 2 * (v % 2) + v / 2 % 2;
  }
  static __device__ __forceinline__ constexpr int column(int v, uint lane) {
    return 32 * (v / 4) + 8 * (lane % 4) + 4 * (v / 2 % 2);
  }
};

// What o has of Inf, -Inf, NaN: bits 1, 2, 4.
template <int kValues>
struct Marks {
#if KF_CAREFUL
  uint of[kValues] = {};
#endif
};

// (m, l) of the row at `state` of the block; whether it has seen a key.
DEVICE bool load_sums(Sums& c, int r, const Params& p, uint64 state) {
  const float2 ml = reinterpret_cast<const float2*>(p.ml)[state];
  c.m[r] = ml.x;
  c.l[r] = ml.y * (1 / kWeightUnit);
  c.t[r] = 0;
  return ml.y != 0;
}
DEVICE void store_sums(const Sums& c, int r, const Params& p, uint64 state) {
  reinterpret_cast<float2*>(p.ml)[state] = make_float2(c.m[r], c.l[r] * kWeightUnit);
}

// o of the two rows from column `first` on; zeros where a row has not begun: its memory may hold
// anything. Inf and NaN go to the marks.
template <typename Layout, int kValues>
DEVICE void load_values(float (&o)[kValues], Marks<kValues>& marks, const Params& p,
                        const uint64 (&state)[2], const bool (&begun)[2], int first, uint lane) {
#pragma unroll
  for (int v = 0; v < kValues / Layout::kWidth; ++v) {
    const int column = first + Layout::column(v, lane);
    typename Layout::Vector vector = {};
    if (begun[v % 2] && column < KF_VALUE_PITCH) {
      vector = *reinterpret_cast<const typename Layout::Vector*>(
          p.o + 4 * (state[v % 2] * KF_VALUE_PITCH + column));
    }
    const float* const values = reinterpret_cast<const float*>(&vector);
#pragma unroll
    for (int x = 0; x < Layout::kWidth; ++x) {
      float y = values[x];
#if KF_CAREFUL
      if (!isfinite(y)) {
        marks.of[Layout::element(v, x)] |= isnan(y) ? 4u : y > 0 ? 1u : 2u;
        y = 0;
      }
#endif
      o[Layout::element(v, x)] = y * (1 / kWeightUnit);
    }
  }
}

template <typename Layout, int kValues>
DEVICE void store_values(const float (&o)[kValues], const Params& p, const uint64 (&state)[2],
                         const bool (&inside)[2], int first, uint lane) {
#pragma unroll
  for (int v = 0; v < kValues / Layout::kWidth; ++v) {
    const int column = first + Layout::column(v, lane);
    if (!inside[v % 2] || column >= KF_VALUE_PITCH) continue;
    typename Layout::Vector vector;
    float* const values = reinterpret_cast<float*>(&vector);
#pragma unroll
    for (int x = 0; x < Layout::kWidth; ++x) {
      values[x] = o[Layout::element(v, x)] * kWeightUnit + 0.0f;  // no -0
    }
    *reinterpret_cast<typename Layout::Vector*>(
        p.o + 4 * (state[v % 2] * KF_VALUE_PITCH + column)) = vector;
  }
}

template <int kValues>
DEVICE bool all_finite(const float (&o)[kValues]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kValues; ++i) finite &= fabsf(o[i]) <= 3.402823466e38f;
  return finite;
}

#if KF_CAREFUL
// After a pass of indicators, and after the last pass.
template <int kValues>
DEVICE void mark_values(const float (&o)[kValues], Marks<kValues>& marks, int pass) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (o[i] > 0) marks.of[i] |= 1u << (pass - 1);
  }
}
template <int kValues>
DEVICE void apply_marks(float (&o)[kValues], const Marks<kValues>& marks) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (marks.of[i] == 0) continue;
    o[i] += marks.of[i] == 1 ? -kHidden : marks.of[i] == 2 ? kHidden : __int_as_float(0x7fc00000);
  }
}
#endif

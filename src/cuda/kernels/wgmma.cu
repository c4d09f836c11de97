// Prefill on Hopper (compute capability 9.0), for float16 and bfloat16. A producer warp copies
// tiles of K and V by TMA; each consumer warpgroup folds them into its 64 rows by wgmma: the next
// tile's scores are computed while the last one's weights meet V, and one warpgroup's softmax runs
// while another's products do (FlashAttention-3: Shah et al., 2024).
//
// The fold goes on from the state in memory, tile of keys after tile of keys, counted from key 0,
// so that the end of a chunk changes nothing. Tiles that no row sees would change nothing either,
// and are left out.
//
// Inf and NaN of V have no place in a product, where 0 times them would be NaN. Where the output is
// not finite, the state stays as it is and the job is left to the same kernel with KEYFOLD_CAREFUL,
// which meets the keys four times: with 1 where V is Inf, -Inf, NaN, and then with the rest of V.
#include "hopper.cuh"

constexpr bool kCareful = KEYFOLD_CAREFUL;
constexpr u32 kKeys = KEYFOLD_KEYS;              // of a tile
constexpr u32 kWarpgroups = KEYFOLD_WARPGROUPS;  // that consume
constexpr bool kFinished = KEYFOLD_FINISHED;     // scores are more than products times the scale
constexpr u32 kStages = 2;
constexpr u32 kRows = 64 * kWarpgroups, kConsumers = 128 * kWarpgroups;
static_assert(kThreads == kConsumers + 128 && kSplitLen % kKeys == 0, "as in kernel_shape.hpp");
// Panels of 64 columns.
constexpr u32 kHeadPanels = (kHeadDim + 63) / 64, kValuePanels = (kValueDim + 63) / 64;
constexpr u32 kHeadWidth = 64 * kHeadPanels, kValueWidth = 64 * kValuePanels;
constexpr u32 kQueryPanel = 64 * 128, kKeyPanel = kKeys * 128;  // bytes
constexpr u32 kKeyBytes = kHeadPanels * kKeyPanel, kValueBytes = kValuePanels * kKeyPanel;
// Shared memory: q, the stages of K, those of V, barriers.
constexpr u32 kKeysAt = kWarpgroups * kHeadPanels * kQueryPanel;
constexpr u32 kValuesAt = kKeysAt + kStages * kKeyBytes;
constexpr u32 kBarriersAt = kValuesAt + kStages * kValueBytes;
// One warpgroup issues products while others compute softmax, by turns.
constexpr bool kTurns = kWarpgroups > 1 && kHeadWidth <= 128 && kValueWidth <= 128 && !kCareful;
constexpr i32 kPasses = kCareful ? 4 : 1;

// Weights are taken times 2^kWeightBits: float16 holds those down to 2^-39.
constexpr float kWeightBits = kDType == 2 ? 0.0f : 15.0f;
constexpr float kWeightUnit = kDType == 2 ? 1.0f : 1.0f / 32768.0f;
constexpr float kLog2e = 1.44269504f;

// What a launch works on.
struct Jobs {
  u64 redo;    // u32 [groups][tiles][kWarpgroups]: whether the careful kernel has to
  u32 groups;  // of the chunk
  u32 tiles;   // of rows, in each
};

// --- Jobs ---------------------------------------------------------------------------------------

// One tile of rows of one group, and the tiles of keys that it meets.
struct Job {
  u32 group, first;  // absolute; index of the first row
  u32 batch, kv_head;
  i32 begin, end;  // tiles of keys
  Range full;      // keys that all its rows see
  Batch seen;
  u64 redo;  // its flags
  bool skip;
};

// The i-th job of this block; false behind the last. Jobs with many keys begin first, and every
// second round goes the other way, so that all blocks get about the same work.
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
  job.redo = jobs.redo + 4 * ((group * jobs.tiles + tile) * kWarpgroups);
  const u32 last = smaller(job.first + kRows, p.index_end) - 1;
  const Range early = visible(job.seen, job.first / p.heads),
              late = visible(job.seen, last / p.heads);
  job.begin = early.begin / i32(kKeys);
  job.end = (late.end + i32(kKeys) - 1) / i32(kKeys);
  job.full = {late.begin, early.end};
  job.skip = early.begin >= late.end;
  if (kCareful) {
    u32 any = 0;
    for (u32 w = 0; w < kWarpgroups; ++w) any |= load_word(job.redo + 4 * w);
    job.skip = job.skip || any == 0;
  }
  return true;
}

// --- The producer -------------------------------------------------------------------------------

struct Barriers {  // of keys and values: one a stage
  u32 q_full, q_empty, k_full, k_empty, v_full, v_empty;
};
KEYFOLD_INLINE Barriers barriers_at(u32 at) {
  return {
      at, at + 8, at + 16, at + 16 + 8 * kStages, at + 16 + 16 * kStages, at + 16 + 24 * kStages};
}
// A place in the ring of stages.
struct Ring {
  u32 stage = 0, parity = 0;
  KEYFOLD_INLINE void step() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

KEYFOLD_INLINE void produce(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                            const Params& p, const Jobs& jobs, u32 base, const Barriers& bars) {
  Ring k_ring, v_ring;
  u32 q_parity = 1;
  Job job;
  for (u32 i = 0; job_of(p, jobs, i, job); ++i) {
    if (job.skip) continue;
    // A tensor that is broadcast over heads or batch entries has one of them.
    const auto tile = [&](const TensorMap& map, u32 panels, u32 to, u32 full, i32 n, bool heads,
                          bool batches) {
      barrier_expect(full, panels * kKeyPanel);
      for (u32 c = 0; c < panels; ++c) {
        copy_4d(to + c * kKeyPanel, map, full, 64 * c, n * kKeys, heads ? job.kv_head : 0,
                batches ? job.batch : 0);
      }
    };
    const auto keys = [&](i32 n) {
      barrier_wait(bars.k_empty + 8 * k_ring.stage, k_ring.parity ^ 1);
      tile(k_map, kHeadPanels, base + kKeysAt + k_ring.stage * kKeyBytes,
           bars.k_full + 8 * k_ring.stage, n, p.k_head != 0, p.k_batch != 0);
      k_ring.step();
    };
    const auto values = [&](i32 n) {
      barrier_wait(bars.v_empty + 8 * v_ring.stage, v_ring.parity ^ 1);
      tile(v_map, kValuePanels, base + kValuesAt + v_ring.stage * kValueBytes,
           bars.v_full + 8 * v_ring.stage, n, p.v_head != 0, p.v_batch != 0);
      v_ring.step();
    };
    barrier_wait(bars.q_empty, q_parity);
    q_parity ^= 1;
    barrier_expect(bars.q_full, kWarpgroups * kHeadPanels * kQueryPanel);
    for (u32 w = 0; w < kWarpgroups; ++w) {
      for (u32 c = 0; c < kHeadPanels; ++c) {
        copy_3d(base + (w * kHeadPanels + c) * kQueryPanel, q_map, bars.q_full, 64 * c,
                job.first + 64 * w, job.group - p.block_group);
      }
    }
    for (i32 pass = 0; pass < kPasses; ++pass) {
      keys(job.begin);
      for (i32 n = job.begin + 1; n < job.end; ++n) {
        keys(n);
        values(n - 1);
      }
      values(job.end - 1);
    }
  }
}

// --- Consumers ----------------------------------------------------------------------------------

// What a thread holds of two rows, g and g + 8 of its warp's 16: of 8 columns, two neighbours.
//   element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
struct Rows {
  float o[kValueWidth / 2], s[kKeys / 2];
  u32 w[kKeys / 4];  // weights, as the left side of products
  float m[2], l[2];
  float t[2];  // this thread's part of l since the last split's end
  Range seen[2];
  u64 mask[2];
};

KEYFOLD_INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYFOLD_INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYFOLD_INLINE u32 pack(float low, float high) {
  u32 r;
  if constexpr (kDType == 2) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}
KEYFOLD_INLINE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
KEYFOLD_INLINE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// score() with tanh by two instructions, whose errors of 2^-22 are far below those of 16-bit
// products.
KEYFOLD_INLINE float fast_score(const Params& p, float product, u64 mask) {
  float s = product * p.scale;
  if constexpr (kSoftcap) {
    s = p.softcap * (1.0f - 2.0f * reciprocal(1.0f + exp2_fast(s * (2.0f * kLog2e))));
  }
  if constexpr (kMaskType != 0) {
    const float bias = mask_value(mask);
    s = bias == hidden() ? hidden() : (kMaskType == 1 ? s : s + bias);
  }
  return s;
}

// Hides and finishes the scores of tile n.
KEYFOLD_INLINE void finish_scores(Rows& c, const Params& p, const Job& job, i32 n, u32 lane) {
  const i32 first = n * i32(kKeys);
  const bool edge = first < job.full.begin || first + i32(kKeys) > job.full.end;
  if (!edge && !kFinished) return;
#pragma unroll
  for (u32 i = 0; i < kKeys / 2; ++i) {
    const i32 key = first + i32(i / 4 * 8 + 2 * (lane % 4) + i % 2);
    const u32 r = i / 2 % 2;
    if (key < c.seen[r].begin || key >= c.seen[r].end) {
      c.s[i] = hidden();
    } else if (kFinished) {
      c.s[i] = fast_score(p, c.s[i], kMaskType == 0 ? 0 : c.mask[r] + i64(key) * p.mask_key);
    }
  }
}

// Beyond this the product of a maximum and log2(e) is too coarse to take scores against, or
// overflows.
constexpr float kFar = 4096.0f;

// Scores become weights, in place; `alpha`: the factors of what was before. It is 1, to the bit,
// where the maximum stays.
KEYFOLD_INLINE void softmax(Rows& c, const Params& p, float (&alpha)[2]) {
  const float unit = kFinished ? 1.0f : p.scale, exponent = unit * kLog2e;
  float base[2];
  bool far[2];
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    float most[2] = {c.s[2 * r], c.s[2 * r + 1]};
#pragma unroll
    for (u32 i = 4; i < kKeys / 2; i += 4) {
      most[0] = fmaxf(most[0], c.s[i + 2 * r]);
      most[1] = fmaxf(most[1], c.s[i + 2 * r + 1]);
    }
    const float m = fmaxf(c.m[r], quad_max(fmaxf(most[0], most[1])) * unit);
    base[r] = base_of(m) * kLog2e;
    far[r] = fabsf(base[r]) > kFar;
    alpha[r] = exp2_fast(far[r] ? (c.m[r] - m) * kLog2e
                                : c.m[r] * kLog2e - base[r]);  // rounded twice: 1 where m stays
    c.m[r] = m;
  }
  if (__any_sync(~0u, far[0] || far[1])) {
#pragma unroll
    for (u32 i = 0; i < kKeys / 2; ++i) {
      const u32 r = i / 2 % 2;
      if (far[r]) c.s[i] = (c.s[i] * unit - c.m[r]) * (1.0f / unit);
    }
    for (u32 r = 0; r < 2; ++r) base[r] = far[r] ? 0.0f : base[r];
  }
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    c.l[r] *= alpha[r];
    float sum[2] = {c.t[r] * alpha[r], 0.0f};
#pragma unroll
    for (u32 i = 0; i < kKeys / 2; i += 4) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        float& s = c.s[i + 2 * r + e];
        s = exp2_fast(fmaf(s, exponent, kWeightBits - base[r]));
        sum[e] += s;
      }
    }
    c.t[r] = sum[0] + sum[1];
  }
}

// Keeps the assembler from moving exponentials behind the next wait: sums of weights are never
// negative.
KEYFOLD_INLINE void stay_before_wait(const Rows& c) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p trap; }" ::"f"(c.t[0] + c.t[1]));
}

// At every split's end, by its absolute position.
KEYFOLD_INLINE void close_split(Rows& c) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    c.l[r] += quad_sum(c.t[r]);
    c.t[r] = 0.0f;
  }
}

// What passes after the first see of a weight is whether it is there.
KEYFOLD_INLINE float weight_of(float x, i32 pass) {
  return kCareful && pass != 0 ? (x != 0.0f ? 1.0f : 0.0f) : x;
}
KEYFOLD_INLINE void pack_weights(Rows& c, i32 pass) {
#pragma unroll
  for (u32 i = 0; i < kKeys / 4; ++i) {
    c.w[i] = pack(weight_of(c.s[2 * i], pass), weight_of(c.s[2 * i + 1], pass));
  }
}

KEYFOLD_INLINE void rescale(Rows& c, const float (&alpha)[2]) {
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; ++i) {
    const float a = alpha[i / 2 % 2];
    // A sum that has overflowed vanishes with its weights.
    c.o[i] = kCareful && a == 0.0f ? 0.0f : c.o[i] * a;
  }
}

KEYFOLD_INLINE void issue_scores(Rows& c, u32 q, u32 k) {
#pragma unroll
  for (u32 i = 0; i < kHeadWidth / 16; ++i) {
    const u32 panel = i / 4, step = 32 * (i % 4);
    Product<kKeys>::of(c.s, matrix_at(q + panel * kQueryPanel + step, kQueryPanel),
                       matrix_at(k + panel * kKeyPanel + step, kKeyPanel), i > 0);
  }
  products_commit();
}
KEYFOLD_INLINE void issue_values(Rows& c, u32 v) {
#pragma unroll
  for (u32 i = 0; i < kKeys / 16; ++i) {
    Product<kValueWidth>::add(c.o, c.w + 4 * i, matrix_at(v + i * 2048, kKeyPanel));
  }
  products_commit();
}

// What a pass after the first looks for: 1 Inf, 2 -Inf, 3 NaN.
template <class T>
KEYFOLD_INLINE bool is_odd(T bits, T infinity, T sign, i32 pass) {
  return pass == 3 ? (bits & ~sign) > infinity : bits == (pass == 1 ? infinity : infinity | sign);
}
// Puts in V's place in shared memory what a pass needs: see the head of the file.
KEYFOLD_INLINE void transform_values(u32 address, i32 pass, u32 thread) {
  constexpr u32 kInfinity = kDType == 2 ? 0x7f80u : 0x7c00u, kOne = kDType == 2 ? 0x3f80u : 0x3c00u;
  for (u32 at = address + 4 * thread; at < address + kValueBytes; at += 4 * kConsumers) {
    u32 word, result = 0;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    for (u32 shift = 0; shift < 32; shift += 16) {
      const u32 x = word >> shift & 0xffffu;
      const u32 finite = (x & 0x7fffu) >= kInfinity ? 0 : x;
      result |= (pass == 0 ? finite : is_odd(x, kInfinity, 0x8000u, pass) ? kOne : 0) << shift;
    }
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(result) : "memory");
  }
  fence_async();
  named_sync(8, kConsumers);
}

// Where the two neighbours from element 4 j + 2 r on are in the state; 0 behind the last column.
KEYFOLD_INLINE u64 place_of(const Params& p, u64 state, u32 j, u32 lane) {
  const u32 column = 8 * j + 2 * (lane % 4);
  return column < kValueDim ? p.o + 4 * (state * kValueDim + column) : 0;
}

// Begins with the state in memory; in a pass after the first o is what it looks for.
KEYFOLD_INLINE void load_state(Rows& c, const Params& p, const u64 (&state)[2], i32 pass,
                               u32 lane) {
  bool begun = false;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const float2 ml = read_float2(p.ml + 8 * state[r]);
    c.m[r] = ml.x;
    c.l[r] = ml.y * (1.0f / kWeightUnit);
    c.t[r] = 0.0f;
    begun = begun || ml.y != 0.0f;
  }
  begun = __any_sync(~0u, begun);
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; i += 2) {
    const u64 place = place_of(p, state[i / 2 % 2], i / 4, lane);
    float x[2] = {0.0f, 0.0f};
    if (begun && place != 0) {
      const float2 y = read_float2(place);
      x[0] = y.x, x[1] = y.y;
    }
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      if (kCareful && pass != 0) {
        x[e] = is_odd(__float_as_uint(x[e]), 0x7f800000u, 0x80000000u, pass) ? 1.0f : 0.0f;
      } else if (kCareful && !is_finite(x[e])) {
        x[e] = 0.0f;
      }
      c.o[i + e] = x[e] * (1.0f / kWeightUnit);
    }
  }
}

KEYFOLD_INLINE void store_state(const Rows& c, const Params& p, const u64 (&state)[2],
                                const bool (&inside)[2], u32 lane) {
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; i += 2) {
    const u64 place = place_of(p, state[i / 2 % 2], i / 4, lane);
    if (!inside[i / 2 % 2] || place == 0) continue;
    write(place,
          float2{positive_zero(c.o[i] * kWeightUnit), positive_zero(c.o[i + 1] * kWeightUnit)});
  }
  if (lane % 4 != 0) return;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    if (!inside[r]) continue;
    // A NaN score, or one of +Inf: the row stays NaN whatever it is merged with.
    write(p.ml + 8 * state[r], float2{is_nan(c.l[r]) ? nan() : c.m[r], c.l[r] * kWeightUnit});
  }
}

// Whether one of the warpgroup's outputs is not finite.
KEYFOLD_INLINE bool any_odd(const Rows& c, u32 warpgroup) {
  bool finite = true;
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; ++i) finite = finite && is_finite(c.o[i]);
  u32 odd;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.b32 p, %1, 0; barrier.red.or.pred q, %2, 128, p;\n"
      "selp.b32 %0, 1, 0, q; }"
      : "=r"(odd)
      : "r"(finite ? 0 : 1), "r"(4 + warpgroup)
      : "memory");
  return odd != 0;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    wgmma(const __grid_constant__ Params p, const __grid_constant__ TensorMap q_map,
          const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
          const __grid_constant__ Jobs jobs) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared);
  const Barriers bars = barriers_at(base + kBarriersAt);
  if (threadIdx.x == 0) {
    barrier_init(bars.q_full, 1);
    barrier_init(bars.q_empty, kWarpgroups);
    for (u32 i = 0; i < 8 * kStages; i += 8) {
      barrier_init(bars.k_full + i, 1);
      barrier_init(bars.k_empty + i, kWarpgroups);
      barrier_init(bars.v_full + i, 1);
      barrier_init(bars.v_empty + i, kWarpgroups);
    }
    barriers_are_there();
    prefetch_map(q_map);
    prefetch_map(k_map);
    prefetch_map(v_map);
  }
  __syncthreads();

  // All registers: 40 and 2 x 232, or 32 and 3 x 160, of 128 threads each.
  if (threadIdx.x < 128) {
    give_registers<kWarpgroups == 3 ? 32 : 40>();
    if (threadIdx.x == 0) produce(q_map, k_map, v_map, p, jobs, base, bars);
    return;
  }
  take_registers<kWarpgroups == 3 ? 160 : 232>();
  const u32 consumer = threadIdx.x - 128, warpgroup = consumer / 128, lane = consumer % 32;
  const u32 row = consumer / 32 * 16 + lane / 4;  // of the tile; and row + 8
  const u32 q = base + warpgroup * kHeadPanels * kQueryPanel;
  const bool leader = consumer % 128 == 0;
  const auto my_turn = [&] {
    if (kTurns) named_sync(1 + warpgroup, 256);
  };
  const auto next_turn = [&] {
    if (kTurns) named_arrive(1 + (warpgroup + 1) % kWarpgroups, 256);
  };
  if (kTurns && warpgroup == kWarpgroups - 1) next_turn();

  Ring k_ring, v_ring;
  u32 q_parity = 0;
  Rows c;
  Job job;
  for (u32 i = 0; job_of(p, jobs, i, job); ++i) {
    if (job.skip) continue;
    u64 state[2];
    bool inside[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const u32 index = job.first + row + 8 * r;
      inside[r] = index < p.index_end;
      const u32 at = smaller(index, p.index_end - 1);
      c.seen[r] = visible(job.seen, at / p.heads);
      state[r] = state_index(p, job.group, at);
      if (kMaskType != 0) c.mask[r] = mask_address(p, job.batch, job.group, at);
    }
    barrier_wait(bars.q_full, q_parity);
    q_parity ^= 1;

    u32 marks[kCareful ? kValueWidth / 2 : 1] = {};  // bits of the passes
    for (i32 pass = kPasses - 1; pass >= 0; --pass) {
      float alpha[2];
      const auto weigh = [&](i32 n) {
        finish_scores(c, p, job, n, lane);
        softmax(c, p, alpha);
      };
      const auto take_keys = [&] {
        barrier_wait(bars.k_full + 8 * k_ring.stage, k_ring.parity);
        my_turn();
        hold(c.s);
        hold(c.o);
        hold(c.w);
        products_begin();
        issue_scores(c, q, base + kKeysAt + k_ring.stage * kKeyBytes);
      };
      const auto give_keys = [&] {
        hold(c.s);
        if (leader) barrier_arrive(bars.k_empty + 8 * k_ring.stage);
        k_ring.step();
      };
      const auto take_values = [&] {
        const u32 v = base + kValuesAt + v_ring.stage * kValueBytes;
        barrier_wait(bars.v_full + 8 * v_ring.stage, v_ring.parity);
        if (kCareful) transform_values(v, pass, consumer);
        issue_values(c, v);
      };
      const auto give_values = [&] {
        hold(c.o);
        hold(c.w);
        if (leader) barrier_arrive(bars.v_empty + 8 * v_ring.stage);
        v_ring.step();
      };

      load_state(c, p, state, pass, lane);
      take_keys();
      next_turn();
      products_wait<0>();
      give_keys();
      weigh(job.begin);
      pack_weights(c, pass);
      rescale(c, alpha);
      for (i32 n = job.begin + 1; n < job.end; ++n) {
        if (n * i32(kKeys) % i32(kSplitLen) == 0) close_split(c);
        take_keys();
        take_values();
        next_turn();
        products_wait<1>();
        give_keys();
        weigh(n);
        stay_before_wait(c);
        products_wait<0>();
        give_values();
        pack_weights(c, pass);
        rescale(c, alpha);
      }
      if (pass == 0 && leader) barrier_arrive(bars.q_empty);
      hold(c.o);
      hold(c.w);
      products_begin();
      take_values();
      close_split(c);
      products_wait<0>();
      give_values();

      if (kCareful && pass != 0) {
#pragma unroll
        for (u32 j = 0; j < kValueWidth / 2; ++j) marks[j] |= c.o[j] > 0.0f ? 1u << pass : 0;
      }
    }

    bool write = true;
    if constexpr (kCareful) {
#pragma unroll
      for (u32 j = 0; j < kValueWidth / 2; ++j) {
        if (marks[j] != 0) c.o[j] += marks[j] == 2 ? -hidden() : marks[j] == 4 ? hidden() : nan();
      }
      write = load_word(job.redo + 4 * warpgroup) != 0;
    } else {
      write = !any_odd(c, warpgroup);
      if (leader) write_word(job.redo + 4 * warpgroup, write ? 0 : 1);
    }
    if (write) store_state(c, p, state, inside, lane);
  }
}

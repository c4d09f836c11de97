// The consumers of wgmma.cu: what a warpgroup holds of its rows, and how it folds tiles of keys
// into them, ends them, and leaves them to another block.
#pragma once

#include "scores.cuh"
#include "wgmma_copies.cuh"

// What a thread holds of two rows, g and g + 8 of its warp's 16: of 8 columns, two neighbours.
//   element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
struct Rows {
  float o[kValueWidth / 2], s[kKeys / 2];
  u32 w[kKeys / 4];  // weights, as the left side of products
  float m[2], l[2];
  float t[2];         // this thread's part of l since the last split's end
  u64 mask[2];        // kMaskValues: see scores.cuh
  u32 bias_place[2];  // kBiased
};

// What finished scores are in units of: where no values are added to them, the cap is left to the
// exponents, which have a factor anyway.
constexpr bool kCapsLater = kSoftcap && kMaskType <= 1;
KEYFOLD_INLINE float unit_of(const Params& p) {
  return kCapsLater ? p.softcap : kFinished ? 1.0f : p.scale;
}

// Hides and finishes the scores of a tile. What rows see is looked up where it is needed, since it
// would take registers everywhere.
KEYFOLD_INLINE void finish_scores(Rows& c, const Params& p, const Job& job, u32 row,
                                  const Tile& tile, BiasRing& biases, u32 base,
                                  const Barriers& bars, u32 lane) {
  const i32 n = tile.n;
  const i32 first = n * i32(kKeys);
  const bool edge = first < job.full.begin || first + i32(kKeys) > job.full.end;
  if (!edge && !kFinished) return;
  const auto seen = [&](u32 r) {
    const u32 index = smaller(job.first + row + 8 * r, p.index_end - 1);
    return visible(load_batch(p, job.group / p.kv_heads), index / p.heads);
  };
  const i32 begin = first + 2 * i32(lane % 4);
  if constexpr (kBiased) {
    if (kSoftcap) scale_scores(c.s, p, p.softcap);
    if (tile.full) {
      add_biases<false>(c.s, p.scale, c.bias_place, biases, base, bars, lane == 0);
    } else {
      add_biases<true>(c.s, p.scale, c.bias_place, biases, base, bars, lane == 0);
    }
    if (edge) hide_outside(c.s, begin, seen(0), seen(1));
  } else {
    finish_scores<kMaskValues>(c.s, p, c.mask, begin, edge, kCapsLater ? 1.0f : p.softcap, seen);
  }
}

// Beyond this the product of a maximum and log2(e) is too coarse to take scores against, or
// overflows.
constexpr float kFar = 4096.0f;

// What the weights of a tile are taken against, and the factors of what was before, which are 1, to
// the bit, where the maximum stays.
struct Step {
  float base[2], alpha[2];
};
KEYFOLD_INLINE Step raise_maxima(Rows& c, const Params& p) {
  const float unit = unit_of(p);
  Step step;
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
    step.base[r] = base_of(m) * kLog2e;
    far[r] = fabsf(step.base[r]) > kFar;
    step.alpha[r] =
        exp2_fast(far[r] ? (c.m[r] - m) * kLog2e
                         : c.m[r] * kLog2e - step.base[r]);  // rounded twice: 1 where m stays
    c.m[r] = m;
  }
  if (__any_sync(~0u, far[0] || far[1])) {
#pragma unroll
    for (u32 i = 0; i < kKeys / 2; ++i) {
      const u32 r = i / 2 % 2;
      if (far[r]) c.s[i] = (c.s[i] * unit - c.m[r]) * (1.0f / unit);
    }
    for (u32 r = 0; r < 2; ++r) step.base[r] = far[r] ? 0.0f : step.base[r];
  }
  return step;
}

// What passes other than 0 see of a weight, and of a factor, is whether it is there.
KEYFOLD_INLINE float weight_of(float x, i32 pass) {
  return kCareful && pass != 0 ? (x != 0.0f ? 1.0f : 0.0f) : x;
}
// A sum that has overflowed vanishes with its weights.
KEYFOLD_INLINE float rescaled(float x, float alpha) {
  return kCareful && alpha == 0.0f ? 0.0f : x * alpha;
}
KEYFOLD_INLINE void rescale_outputs(Rows& c, const Step& step, i32 pass) {
#pragma unroll
  for (u32 j = 0; j < kValueWidth / 2; ++j) {
    c.o[j] = rescaled(c.o[j], weight_of(step.alpha[j / 2 % 2], pass));
  }
}
// Scores of part of the keys become weights; the first time what was before is rescaled, but for
// outputs that products are still added to.
KEYFOLD_INLINE void weigh(Rows& c, const Params& p, const Step& step, i32 pass, u32 part) {
  const float exponent = unit_of(p) * kLog2e;
  constexpr u32 kScores = kKeys / 2 / kWeighings;
  float sum[4] = {c.t[0], c.t[1], 0.0f, 0.0f};
  if (part == 0) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) c.l[r] *= step.alpha[r], sum[r] *= step.alpha[r];
    if (!kAhead) rescale_outputs(c, step, pass);
  }
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
#pragma unroll
    for (u32 i = part * kScores; i < (part + 1) * kScores; i += 4) {
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        float& s = c.s[i + 2 * r + e];
        s = exp2_fast(fmaf(s, exponent, kWeightBits - step.base[r]));
        sum[2 * e + r] += s;
      }
    }
  }
#pragma unroll
  for (u32 r = 0; r < 2; ++r) c.t[r] = sum[r] + sum[2 + r];
}

// At every split's end, by its absolute position.
KEYFOLD_INLINE void close_split(Rows& c) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    c.l[r] += quad_sum(c.t[r]);
    c.t[r] = 0.0f;
  }
}

KEYFOLD_INLINE void pack_weights(Rows& c, i32 pass, u32 part) {
  constexpr u32 kPairs = kKeys / 4 / kWeighings;
#pragma unroll
  for (u32 i = part * kPairs; i < (part + 1) * kPairs; ++i) {
    c.w[i] = pack(weight_of(c.s[2 * i], pass), weight_of(c.s[2 * i + 1], pass));
  }
}

// The products of a part.
KEYFOLD_INLINE void issue_scores(Rows& c, u32 q, u32 k, u32 part) {
  products_begin();
#pragma unroll
  for (u32 i = 0; i < 4 * kPartPanels; ++i) {
    const u32 panel = i / 4, step = 32 * (i % 4);
    Product<kKeys>::of(
        c.s, matrix_at(q + (part * kPartPanels + panel) * kQueryPanel + step, kQueryPanel),
        matrix_at(k + panel * kKeyPanel + step, kKeyPanel), part > 0 || i > 0);
  }
}
// The products of 16 keys.
KEYFOLD_INLINE void issue_values(Rows& c, u32 v, u32 step) {
  constexpr u32 kSteps = kPartKeys / 16;
  Product<kValueWidth>::add(c.o, c.w + 4 * step, matrix_at(v + step % kSteps * 2048, kValuePanel));
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

// The state that a row goes on from, or the partial state that it makes.
KEYFOLD_INLINE u64 state_of(const Params& p, const Job& job, u32 index) {
  return kPartial ? partial_index(p, job.group - p.group, job.split, index)
                  : state_index(p, job.group, index);
}
KEYFOLD_INLINE u64 ml_of(const Params& p, u64 state) {
  return (kPartial ? p.partial_ml : p.ml) + 8 * state;
}
// Where the two neighbours from element 4 j + 2 r on are in it; 0 behind the last column.
KEYFOLD_INLINE u64 place_of(const Params& p, u64 state, u32 j, u32 lane) {
  const u32 column = 8 * j + 2 * (lane % 4);
  const u64 o = kPartial ? p.partial_o : p.o;
  return column < kValueDim ? o + 4 * (state * kValueDim + column) : 0;
}

// Begins with the state in memory, or the empty one; in a pass after the first o is what it looks
// for.
KEYFOLD_INLINE void load_state(Rows& c, const Params& p, const u64 (&state)[2], i32 pass,
                               u32 lane) {
  constexpr bool kBegins = kPartial || kEnded;
  bool begun = false;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    float2 ml{hidden(), 0.0f};
    if (!kBegins) ml = read_float2(ml_of(p, state[r]));
    c.m[r] = ml.x;
    c.l[r] = ml.y * (1.0f / kWeightUnit);
    c.t[r] = 0.0f;
    begun = begun || (!kBegins && ml.y != 0.0f);
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
    write(ml_of(p, state[r]), float2{is_nan(c.l[r]) ? nan() : c.m[r], c.l[r] * kWeightUnit});
  }
}

// A row of a job's tile, in the caller's tensors.
struct Place {
  u32 batch, kv_head, head, row;
  bool inside;
};
KEYFOLD_INLINE Place place_in(const Params& p, const Job& job, u32 row) {
  const u32 index = job.first + row;
  return {job.group / p.kv_heads, job.group % p.kv_heads, index % p.heads, index / p.heads,
          index < p.index_end};
}
KEYFOLD_INLINE End end_at(const Params& p, const Ends& ends, const Place& at, float m, float l) {
  return end_of(ends, is_nan(l) ? nan() : m, l * kWeightUnit, at.kv_head * p.heads + at.head);
}
KEYFOLD_INLINE void write_lse(const Ends& ends, const End& end, const Place& at) {
  write_lse(ends, end, at.batch, at.kv_head, at.head, at.row);
}

// As bits_of(), NaN included.
KEYFOLD_INLINE u32 pair_of(float low, float high) {
  if (is_nan(low) || is_nan(high)) return bits_of(low, kDType) | u32(bits_of(high, kDType)) << 16;
  return pack(low, high);
}

// Results of the rows, where out's columns are neighbours and even in number.
KEYFOLD_INLINE void store_results(const Rows& c, const Params& p, const Ends& ends, const Job& job,
                                  u32 row, u32 lane) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const Place at = place_in(p, job, row + 8 * r);
    if (!at.inside) continue;
    const End end = end_at(p, ends, at, c.m[r], c.l[r]);
    const u64 out = address_of(ends.out, at.batch, at.kv_head, at.head, at.row);
#pragma unroll
    for (u32 j = 0; j < kValueWidth / 8; ++j) {
      const u32 column = 8 * j + 2 * (lane % 4);
      const float* const o = c.o + 4 * j + 2 * r;
      if (column >= ends.value_dim) continue;
      write_word(out + 2 * column,
                 pair_of(result_of(end, o[0] * kWeightUnit), result_of(end, o[1] * kWeightUnit)));
    }
    if (lane % 4 == 0) write_lse(ends, end, at);
  }
}

// --- Cuts ---------------------------------------------------------------------------------------

// A warpgroup's part of what is left at a cut: its registers as they are, so that no bit changes.
// Who goes on finds it there when its rows of q are: see hand_out().
constexpr u32 kPartWords = kValueWidth / 8 + 2;  // of 16 bytes, each thread's
KEYFOLD_INLINE u64 part_at(const Jobs& jobs, u32 cut, u32 warpgroup, u32 thread) {
  const u32 flags = (4 * gridDim.x * kWarpgroups + 255) / 256 * 256;
  return jobs.parts + flags + u64(cut * kWarpgroups + warpgroup) * kPartWords * 2048 + 16 * thread;
}
// `split`: of the tile before.
KEYFOLD_INLINE void leave(const Rows& c, const Jobs& jobs, u32 cut, i32 split) {
  const u32 thread = thread_index() % 128, warpgroup = thread_index() / 128 - 1;
  const u64 to = part_at(jobs, cut, warpgroup, thread);
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 8; ++i) {
    write(to + 2048 * i, float4{c.o[4 * i], c.o[4 * i + 1], c.o[4 * i + 2], c.o[4 * i + 3]});
  }
  write(to + 2048 * (kPartWords - 2), float4{c.m[0], c.m[1], c.l[0], c.l[1]});
  write(to + 2048 * (kPartWords - 1), float4{c.t[0], c.t[1], __int_as_float(split), 0.0f});
  named_sync(4 + warpgroup, 128);
  if (thread == 0) {
    asm volatile("fence.acq_rel.gpu;\nst.release.gpu.global.u32 [%0], 1;" ::"l"(
                     cut_flag_of(jobs, cut, warpgroup))
                 : "memory");
  }
}
KEYFOLD_INLINE void resume(Rows& c, const Jobs& jobs, u32 cut, i32& split) {
  const u32 thread = thread_index() % 128, warpgroup = thread_index() / 128 - 1;
  const u64 from = part_at(jobs, cut, warpgroup, thread);
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 8; ++i) {
    const float4 x = read_float4(from + 2048 * i);
    c.o[4 * i] = x.x, c.o[4 * i + 1] = x.y, c.o[4 * i + 2] = x.z, c.o[4 * i + 3] = x.w;
  }
  const float4 ml = read_float4(from + 2048 * (kPartWords - 2));
  const float4 t = read_float4(from + 2048 * (kPartWords - 1));
  c.m[0] = ml.x, c.m[1] = ml.y, c.l[0] = ml.z, c.l[1] = ml.w;
  c.t[0] = t.x, c.t[1] = t.y;
  split = __float_as_int(t.z);
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

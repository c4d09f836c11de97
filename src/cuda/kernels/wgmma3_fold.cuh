// The consumers of wgmma3.cu: scores, softmax and weights times values of a tile, and their state.
#pragma once

#include "wgmma3_jobs.cuh"

// What a thread holds of two rows, g and g + 8 of its warp's 16: of 8 columns, two neighbours.
//   element 4 j + 2 r + e: row g + 8 r, column 8 j + 2 (lane % 4) + e
struct Rows {
  float o[kValueWidth / 2], s[kKeys / 2];
  u32 high[kKeys / 4], low[kKeys / 4];  // weights, as the left side of products
  float m[2], l[2];
  float t[2];       // this thread's part of l since the last split's end
  float factor[2];  // from products of pairs with K's factors to scores
  bool odd[2];
  u64 q[2];  // in device memory
  Range seen[2];
  u64 mask[2];
};

// Of the record in shared memory.
KEYFOLD_INLINE float shared_float(u32 address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
KEYFOLD_INLINE float2 shared_float2(u32 address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
KEYFOLD_INLINE float4 shared_float4(u32 address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
KEYFOLD_INLINE uint2 shared_bits(u32 address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

// Each quad makes pairs of its two rows of q.
KEYFOLD_INLINE void load_queries(Rows& c, const Params& p, const bool (&inside)[2], u32 q, u32 row,
                                 u32 lane) {
  constexpr u32 kVectors = kHeadSteps;
  const float unit = kFinished ? 1.0f : p.scale;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    float4 x[kVectors];
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      const u32 word = lane % 4 + 4 * i;
      x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (inside[r] && word < kHeadWords) x[i] = elements(load_words(c.q[r] + 16 * word), 0);
    }
    const RowExponent of = exponent_of<4>(x);
    c.odd[r] = of.odd;
    c.factor[r] = of.odd ? 0.0f : power_of_two(of.exponent - kTop) * unit;
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      if (of.odd) x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      const Pair pair = split(x[i], of.odd ? 1.0f : power_of_two(kTop - of.exponent));
      const u32 place = q + place_in_panels(row % 64 + 8 * r, lane % 4 + 4 * i, kQueryPanel);
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(place), "r"(pair.high.x),
                   "r"(pair.high.y)
                   : "memory");
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(place + kQueryPart), "r"(pair.low.x),
                   "r"(pair.low.y)
                   : "memory");
    }
  }
}

// Products of pairs to scores with V's bias; where they are not finished, to products.
KEYFOLD_INLINE void scale_scores(Rows& c, u32 record, u32 lane) {
#pragma unroll
  for (u32 j = 0; j < kKeys / 8; ++j) {
    const float4 x = shared_float4(record + factor_at(8 * j + 2 * (lane % 4)));
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float* s = c.s + 4 * j + 2 * r;
      s[0] = fmaf(s[0], x.x * c.factor[r], kFinished ? 0.0f : x.z);
      s[1] = fmaf(s[1], x.y * c.factor[r], kFinished ? 0.0f : x.w);
    }
  }
}

// In float32, where the row or the key is odd.
KEYFOLD_INLINE void odd_scores(Rows& c, const Params& p, const Job& job, i32 n, u32 record,
                               u32 lane) {
  const uint2 bits = shared_bits(record + kOddKeysAt);
  const bool rows = __any_sync(~0u, c.odd[0] || c.odd[1]);
  if (!rows && (bits.x | bits.y) == 0) return;
  const float unit = kFinished ? 1.0f : p.scale;
  const u64 k = p.k + job.batch * p.k_batch + job.kv_head * p.k_head;
#pragma unroll 1
  for (u32 i = 0; i < kKeys; ++i) {
    const i32 key = n * i32(kKeys) + i32(i);
    const bool odd = ((i < 32 ? bits.x : bits.y) >> i % 32 & 1) != 0;
    if (key >= job.seen.limit || !(rows || odd)) continue;
    float sum[2] = {0.0f, 0.0f};
    for (u32 word = lane % 4; word < kHeadWords; word += 4) {
      const float4 x = elements(load_words(k + key * p.k_key + 16 * word), 0);
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const float4 y = elements(load_words(c.q[r] + 16 * word), 0);
        sum[r] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum[r]))));
      }
    }
    const float bias = kFinished ? 0.0f : shared_float(record + bias_at(i));
    sum[0] = fmaf(quad_sum(sum[0]), unit, bias);
    sum[1] = fmaf(quad_sum(sum[1]), unit, bias);
#pragma unroll
    for (u32 at = 0; at < kKeys / 2; ++at) {
      const u32 r = at / 2 % 2;
      if (at / 4 * 8 + 2 * (lane % 4) + at % 2 == i && (odd || c.odd[r])) c.s[at] = sum[r];
    }
  }
}

// Hides and finishes the scores of tile n.
KEYFOLD_INLINE void finish_scores(Rows& c, const Params& p, const Job& job, i32 n, u32 record,
                                  u32 lane) {
  const i32 first = n * i32(kKeys);
  const bool edge = first < job.full.begin || first + i32(kKeys) > job.full.end;
  if (!edge && !kFinished) return;
#pragma unroll
  for (u32 i = 0; i < kKeys / 2; ++i) {
    const u32 r = i / 2 % 2, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    const i32 key = first + i32(column);
    if (key < c.seen[r].begin || key >= c.seen[r].end) {
      c.s[i] = hidden();
    } else if (kFinished) {
      c.s[i] = score(p, c.s[i], kMaskType == 0 ? 0 : c.mask[r] + i64(key) * p.mask_key) +
               shared_float(record + bias_at(column));
    }
  }
}

// Scores become weights, in place; `alpha`: the factors of what was before. It is 1, to the bit,
// where the maximum stays.
KEYFOLD_INLINE void softmax(Rows& c, u32 record, u32 lane, float (&alpha)[2]) {
  float base[2], sum[2];
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    float most[2] = {c.s[2 * r], c.s[2 * r + 1]};
#pragma unroll
    for (u32 i = 4; i < kKeys / 2; i += 4) {
      most[0] = fmaxf(most[0], c.s[i + 2 * r]);
      most[1] = fmaxf(most[1], c.s[i + 2 * r + 1]);
    }
    const float m = fmaxf(c.m[r], quad_max(fmaxf(most[0], most[1])));
    base[r] = base_of(m);
    alpha[r] = exp2_fast((c.m[r] - base[r]) * kLog2e);
    c.m[r] = m;
    c.l[r] *= alpha[r];
    sum[r] = c.t[r] * alpha[r];
  }
#pragma unroll
  for (u32 j = 0; j < kKeys / 8; ++j) {
    const float2 unit = shared_float2(record + unit_at(8 * j + 2 * (lane % 4)));
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      float* s = c.s + 4 * j + 2 * r;
      s[0] = exp2_fast(fmaf(s[0] - base[r], kLog2e, float(kWeightBits)));
      s[1] = exp2_fast(fmaf(s[1] - base[r], kLog2e, float(kWeightBits)));
      sum[r] = fmaf(s[0], unit.x, sum[r]);
      sum[r] = fmaf(s[1], unit.y, sum[r]);
    }
  }
  c.t[0] = sum[0];
  c.t[1] = sum[1];
}

// At every split's end, by its absolute position.
KEYFOLD_INLINE void close_split(Rows& c) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    c.l[r] += quad_sum(c.t[r]);
    c.t[r] = 0.0f;
  }
}

// Weights as pairs. The high ones are cut off rather than rounded, which is faster.
KEYFOLD_INLINE void pack_weights(Rows& c) {
#pragma unroll
  for (u32 i = 0; i < kKeys / 4; ++i) {
    float high[2], low[2];
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      const float w = c.s[2 * i + e];
      high[e] = __uint_as_float(__float_as_uint(w) & 0xffffe000u);
      low[e] = w - high[e];
    }
    c.high[i] = pack(high[0], high[1]);
    c.low[i] = pack(low[0], low[1]);
  }
}

KEYFOLD_INLINE void rescale(Rows& c, const float (&alpha)[2]) {
  if (!__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; ++i) {
    const float a = alpha[i / 2 % 2];
    c.o[i] = a == 0.0f ? 0.0f : c.o[i] * a;  // an Inf vanishes with its weight
  }
}

// Where the two neighbours from element 4 j + 2 r on are in a row; whether there are such columns.
KEYFOLD_INLINE u32 column_of(u32 j, u32 lane) { return 8 * j + 2 * (lane % 4); }

// Adds values that are odd, in float32.
KEYFOLD_INLINE void odd_values(Rows& c, const Params& p, const Job& job, i32 n, uint2 bits,
                               u32 lane) {
  if ((bits.x | bits.y) == 0) return;
  const u64 v = p.v + job.batch * p.v_batch + job.kv_head * p.v_head;
#pragma unroll 1
  for (u32 i = 0; i < kKeys; ++i) {
    if (((i < 32 ? bits.x : bits.y) >> i % 32 & 1) == 0) continue;
    float weight[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 at = 0; at < kKeys / 2; ++at) {
      if (at / 4 == i / 8 && at % 2 == i % 2) weight[at / 2 % 2] = c.s[at];
    }
#pragma unroll
    for (u32 r = 0; r < 2; ++r)
      weight[r] = __shfl_sync(~0u, weight[r], (lane & ~3u) + i % 8 / 2) * kWeightUnit;
    const u64 values = v + (n * i64(kKeys) + i) * p.v_key;
#pragma unroll
    for (u32 j = 0; j < kValueWidth / 8; ++j) {
      if (column_of(j, lane) >= kValueDim) continue;
      const float2 x = load_float2(values + 4 * column_of(j, lane));
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        if (weight[r] == 0.0f) continue;
        float* o = c.o + 4 * j + 2 * r;
        o[0] = fmaf(weight[r], x.x, o[0]);
        o[1] = fmaf(weight[r], x.y, o[1]);
      }
    }
  }
}

// A sum of 32 columns; the next is computed while one is added to the scores.
KEYFOLD_INLINE void issue_scores(float (&sum)[kKeys / 2], u32 q, u32 k, u32 part) {
  hold(sum);
  products_begin();
#pragma unroll
  for (u32 term = 0; term < 3; ++term) {
    const u32 left = q + (term == 0 ? kQueryPart : 0), right = k + (term == 1 ? kHeadPart : 0);
#pragma unroll
    for (u32 i = 2 * part; i < smaller(2 * part + 2, kHeadSteps); ++i) {
      const u32 panel = i / 4, step = 32 * (i % 4);
      Product<kKeys>::of(sum, matrix_at(left + panel * kQueryPanel + step, kQueryPanel),
                         matrix_at(right + panel * kKeyPanel + step, kKeyPanel),
                         term > 0 || i > 2 * part);
    }
  }
  products_commit();
}
KEYFOLD_INLINE void compute_scores(Rows& c, u32 q, u32 k) {
  constexpr u32 kParts = (kHeadSteps + 1) / 2;
  float sum[2][kKeys / 2];
  issue_scores(sum[0], q, k, 0);
#pragma unroll
  for (u32 part = 0; part < kParts; ++part) {
    if (part + 1 < kParts) {
      issue_scores(sum[(part + 1) % 2], q, k, part + 1);
      products_wait<1>();
    } else {
      products_wait<0>();
    }
    hold(sum[part % 2]);
#pragma unroll
    for (u32 i = 0; i < kKeys / 2; ++i) {
      c.s[i] = part == 0 ? sum[0][i] : c.s[i] + sum[part % 2][i];
    }
  }
}

KEYFOLD_INLINE void add_values(Rows& c, u32 v) {
  constexpr float kUnit = kWeightUnit / (1 << kValueTop);
#pragma unroll
  for (u32 part = 0; part < kValueWidth / kColumns; ++part) {
    float sum[kColumns / 2];
    hold(sum);
    hold(c.high);
    hold(c.low);
    products_begin();
#pragma unroll
    for (u32 term = 0; term < 3; ++term) {
      const u32 right = v + (term == 1 ? kValuePart : 0) + part * (kColumns / 64) * kKeyPanel;
#pragma unroll
      for (u32 i = 0; i < kKeys / 16; ++i) {
        Product<kColumns>::add(sum, (term == 0 ? c.low : c.high) + 4 * i,
                               matrix_at(right + i * 2048, kKeyPanel), term + i > 0);
      }
    }
    products_commit();
    products_wait<0>();
    hold(sum);
    hold(c.high);
    hold(c.low);
#pragma unroll
    for (u32 i = 0; i < kColumns / 2; ++i) {
      float& o = c.o[part * (kColumns / 2) + i];
      o = fmaf(sum[i], kUnit, o);
    }
  }
}

// --- The state in memory ------------------------------------------------------------------------

KEYFOLD_INLINE void empty_state(Rows& c) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) c.m[r] = hidden(), c.l[r] = c.t[r] = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; ++i) c.o[i] = 0.0f;
}

KEYFOLD_INLINE void load_state(Rows& c, const Params& p, const u64 (&state)[2], u32 lane) {
  bool begun[2];
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const float2 ml = read_float2(p.ml + 8 * state[r]);
    c.m[r] = ml.x;
    c.l[r] = ml.y;
    c.t[r] = 0.0f;
    begun[r] = ml.y != 0.0f;
  }
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; i += 2) {
    const u32 r = i / 2 % 2, column = column_of(i / 4, lane);
    float2 x{0.0f, 0.0f};
    if (begun[r] && column < kValueDim) x = read_float2(p.o + 4 * (state[r] * kValueDim + column));
    c.o[i] = x.x;
    c.o[i + 1] = x.y;
  }
}

// To `state` of o and ml: the states, or partial ones.
KEYFOLD_INLINE void store_state(const Rows& c, u64 o, u64 ml, const u64 (&state)[2],
                                const bool (&inside)[2], u32 lane) {
#pragma unroll
  for (u32 i = 0; i < kValueWidth / 2; i += 2) {
    const u32 r = i / 2 % 2, column = column_of(i / 4, lane);
    if (!inside[r] || column >= kValueDim) continue;
    write(o + 4 * (state[r] * kValueDim + column),
          float2{positive_zero(c.o[i]), positive_zero(c.o[i + 1])});
  }
  if (lane % 4 != 0) return;
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    if (!inside[r]) continue;
    const float nothing = kPartial ? -1.0f : 0.0f;
    // A NaN score, or one of +Inf: the row stays NaN whatever it is merged with.
    write(ml + 8 * state[r],
          float2{is_nan(c.l[r]) ? nan() : c.m[r], c.l[r] == 0.0f ? nothing : c.l[r]});
  }
}

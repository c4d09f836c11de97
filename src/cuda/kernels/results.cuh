// The caller's tensors, and the end of a row: from its state (m, l, o) to its result, as in
// src/core/normalise.hpp. src/cuda/ends.hpp has the twins of the structs. Strides count bytes.
#pragma once

#include "types.cuh"

// A tensor [batch, heads, len, dim], with the heads of a group innermost.
struct TensorRows {
  u64 at;  // of batch entry 0, group 0, head 0, the block's first row
  i64 batch, group, head, row, column;
};
KEYFOLD_INLINE u64 address_of(const TensorRows& t, u32 batch, u32 kv_head, u32 head, u32 row) {
  return t.at + i64(batch) * t.batch + i64(kv_head) * t.group + i64(head) * t.head +
         i64(row) * t.row;
}

// Where rows come from and where they go. Types: 0 float32, 1 float16, 2 bfloat16.
struct Ends {
  TensorRows q;    // at 0: q is gathered
  TensorRows out;  // at 0: states are written
  TensorRows lse;  // float32; at 0: none
  u64 sinks;       // one a head, or 0
  i64 sink_step;
  u32 sinks_type;
  u32 out_type;
  u32 value_dim;  // as it is in memory
  u32 begins;     // states are empty before, and are not read
};

// --- Elements -----------------------------------------------------------------------------------

// float16 and bfloat16 as in src/core/half.hpp, NaN included.
KEYFOLD_INLINE u16 bfloat16_bits(float value) {
  const u32 bits = __float_as_uint(value);
  if (value != value) return u16((bits >> 16) | 0x40);
  return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
KEYFOLD_INLINE u16 float16_bits(float value) {
  const u32 bits = __float_as_uint(value);
  const u32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: 0.5 leaves the rounded multiple of 2^-24 below
    return u16(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return u16(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13));
}
KEYFOLD_INLINE u16 bits_of(float x, u32 type) {
  return type == 1 ? float16_bits(x) : bfloat16_bits(x);
}
KEYFOLD_INLINE void write_element(u64 at, float x, u32 type) {
  if (type == 0) {
    *reinterpret_cast<float*>(at) = x;
  } else {
    *reinterpret_cast<u16*>(at) = bits_of(x, type);
  }
}
KEYFOLD_INLINE float read_element(u64 at, u32 type) {
  if (type == 0) return *reinterpret_cast<const float*>(at);
  const u16 bits = *reinterpret_cast<const u16*>(at);
  if (type == 2) return __uint_as_float(u32(bits) << 16);
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// --- Rows ---------------------------------------------------------------------------------------

// A row's end.
struct End {
  float m, l;     // with the sink
  float weight;   // of o
  float inverse;  // of l
};
// `head`: of queries.
KEYFOLD_INLINE End end_of(const Ends& e, float m, float l, u32 head) {
  End end{m, l, 1.0f, 0.0f};
  if (e.sinks != 0) {
    const float sink = read_element(e.sinks + i64(head) * e.sink_step, e.sinks_type);
    const float most = m > sink || m != m ? m : sink;
    if (most != __uint_as_float(0xff800000u)) {
      end.weight = expf(m - most);
      end.l = l * end.weight + (sink == most ? 1.0f : expf(sink - most));  // also for +Inf
      end.m = most;
    }
  }
  asm("rcp.approx.f32 %0, %1;" : "=f"(end.inverse) : "f"(end.l));
  return end;
}
// An element of the result, weight o / l: twice what the quotient leaves over is divided too, as
// rounding right takes a call, and l is far from where floats end. A weight of 0 leaves even Inf
// out. + 0: a zero has no sign.
KEYFOLD_INLINE float result_of(const End& end, float o) {
  const float x = end.weight * o, rough = x * end.inverse;
  const float close = fmaf(fmaf(-rough, end.l, x), end.inverse, rough);
  const float exact = fmaf(fmaf(-close, end.l, x), end.inverse, close);
  const bool finite = (__float_as_uint(exact) & 0x7fffffffu) < 0x7f800000u;
  return end.l == 0.0f || end.weight == 0.0f ? 0.0f : (finite ? exact : rough) + 0.0f;
}
// Results of four columns, from `column` on, of the row at `row`.
KEYFOLD_INLINE void write_results(const Ends& e, const End& end, u64 row, u32 column, float4 o) {
  const float x[4] = {result_of(end, o.x), result_of(end, o.y), result_of(end, o.z),
                      result_of(end, o.w)};
  const u64 to = row + i64(column) * e.out.column;
  if (e.out_type != 0 && e.out.column == 2 && column + 4 <= e.value_dim && to % 8 == 0) {
    const auto pair = [&](u32 i) {
      return bits_of(x[i], e.out_type) | u32(bits_of(x[i + 1], e.out_type)) << 16;
    };
    *reinterpret_cast<uint2*>(to) = {pair(0), pair(2)};
    return;
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    if (column + i < e.value_dim) write_element(to + i64(i) * e.out.column, x[i], e.out_type);
  }
}
KEYFOLD_INLINE void write_lse(const Ends& e, const End& end, u32 batch, u32 kv_head, u32 head,
                              u32 row) {
  if (e.lse.at == 0) return;
  const float lse = end.l == 0.0f ? __uint_as_float(0xff800000u) : end.m + logf(end.l);
  *reinterpret_cast<float*>(address_of(e.lse, batch, kv_head, head, row)) = lse;
}

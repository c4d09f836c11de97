// What every kernel shares: loading elements, exp, tanh, which keys a row sees, scores, the merge.
// All is compiled with --fmad=false: a fma is where the code says fmaf(), and nowhere else.
#pragma once

#include "params.cuh"

// 16 bytes of q, k, v hold kVecs groups of four elements.
constexpr u32 kVecs = kDType == 0 ? 1 : 2;
constexpr u32 kElements = 4 * kVecs;
constexpr u32 kHeadWords = kHeadDim / kElements;
constexpr u32 kValueWords = kValueDim / kElements;
constexpr u32 kValueVecs = kValueDim / 4;

template <class T>
KEYFOLD_INLINE constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
KEYFOLD_INLINE constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
// x, of which the compiler is told nothing: what is made of it is made where it stands, rather than
// kept in registers from far before.
KEYFOLD_INLINE u32 opaque(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Where a launch may begin before the kernel in front of it has ended (KernelSpec::overlaps): until
// this one's memory is there.
KEYFOLD_INLINE void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The blocks of such a launch may take their places from now on.
KEYFOLD_INLINE void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
KEYFOLD_INLINE i32 clamped(i32 x, i32 least, i32 most) { return smaller(larger(x, least), most); }

// Device memory that no kernel of the launch writes.
KEYFOLD_INLINE uint4 load_words(u64 address) {
  uint4 w;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
      : "l"(address));
  return w;
}
KEYFOLD_INLINE u32 load_word(u64 address) {
  u32 w;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(w) : "l"(address));
  return w;
}
KEYFOLD_INLINE float load_float(u64 address) { return __uint_as_float(load_word(address)); }
KEYFOLD_INLINE float2 load_float2(u64 address) {
  float2 x;
  asm("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(address));
  return x;
}
KEYFOLD_INLINE float4 load_float4(u64 address) {
  float4 x;
  asm("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "l"(address));
  return x;
}
// Device memory that this thread may have written, or the kernel in front of this one.
KEYFOLD_INLINE u32 read_word(u64 address) {
  u32 w;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(w) : "l"(address) : "memory");
  return w;
}
KEYFOLD_INLINE float2 read_float2(u64 address) {
  float2 x;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(address) : "memory");
  return x;
}
KEYFOLD_INLINE float4 read_float4(u64 address) {
  float4 x;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(address)
               : "memory");
  return x;
}
KEYFOLD_INLINE void write_word(u64 address, u32 x) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(x) : "memory");
}
KEYFOLD_INLINE void write(u64 address, float x) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}
KEYFOLD_INLINE void write(u64 address, float2 x) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(x.x), "f"(x.y) : "memory");
}
KEYFOLD_INLINE void write(u64 address, float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x.x), "f"(x.y),
               "f"(x.z), "f"(x.w)
               : "memory");
}

KEYFOLD_INLINE float hidden() { return __uint_as_float(0xff800000u); }  // -inf: of an unseen key
KEYFOLD_INLINE float nan() { return __uint_as_float(0x7fc00000u); }
KEYFOLD_INLINE bool is_nan(float x) { return x != x; }
KEYFOLD_INLINE bool is_finite(float x) { return (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u; }

// Whether a zero came from hidden keys must not show in its sign.
KEYFOLD_INLINE float positive_zero(float x) { return x == 0.0f ? 0.0f : x; }
KEYFOLD_INLINE float4 positive_zeros(const float* x) {
  return {positive_zero(x[0]), positive_zero(x[1]), positive_zero(x[2]), positive_zero(x[3])};
}

KEYFOLD_INLINE float float16_value(u32 bits) {  // of the low half
  float x;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }"
      : "=f"(x)
      : "r"(bits));
  return x;
}

// Elements 4 * part to 4 * part + 3 of a 16-byte word.
KEYFOLD_INLINE float4 elements(uint4 word, u32 part) {
  if constexpr (kDType == 0) {
    return {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z),
            __uint_as_float(word.w)};
  } else {
    const u32 a = part == 0 ? word.x : word.z, b = part == 0 ? word.y : word.w;
    if constexpr (kDType == 1) {
      return {float16_value(a), float16_value(a >> 16), float16_value(b), float16_value(b >> 16)};
    } else {
      return {__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u),  //
              __uint_as_float(b << 16), __uint_as_float(b & 0xffff0000u)};
    }
  }
}

// exp(x) for x <= 0, as on the CPU: x = n ln2 + r with ln2 in two parts, the first so short that n
// times it is exact; a polynomial in r; 2^n by its exponent bits. At most 2 ulp; results below the
// normal range are 0; NaN gives NaN.
KEYFOLD_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, low bits
  const float shifted = fmaf(x, 1.44269502f, kRound);
  const float n = shifted - kRound;
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.3926184e-3f;
  p = fmaf(p, r, 8.36317893e-3f);
  p = fmaf(p, r, 4.16665561e-2f);
  p = fmaf(p, r, 1.66665763e-1f);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  const float result = p * __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return x < -87.3365402f ? 0.0f : result;
}

// tanh below kTanhNear, by an odd polynomial.
constexpr float kTanhNear = 0.625f;
KEYFOLD_INLINE float tanh_near(float x) {
  const float z = x * x;
  float p = -6.09671418e-3f;
  p = fmaf(p, z, 2.09971797e-2f);
  p = fmaf(p, z, -5.38509078e-2f);
  p = fmaf(p, z, 1.33327693e-1f);
  p = fmaf(p, z, -3.33333284e-1f);
  return fmaf(p, x * z, x);
}
// tanh with an error of at most 4 ulp: near 0 as above, else (1 - e) / (1 + e).
KEYFOLD_INLINE float tanh_precise(float x) {
  const float a = fabsf(x);
  const float e = exp_nonpositive(-2.0f * a);
  const float above = 1.0f - e, below = 1.0f + e;
  float inverse;
  asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(below));
  float quotient = above * inverse;
  quotient = fmaf(fmaf(-quotient, below, above), inverse, quotient);
  const float large = x < 0.0f ? -quotient : quotient;
  return a < kTanhNear ? tanh_near(x) : large;  // NaN takes `large`, which is NaN
}

// Keys [begin, end), counted from the chunk's or a split's first key.
struct Range {
  i32 begin, end;
};

// The keys that a row sees, before masks.
KEYFOLD_INLINE Range visible(const Batch& batch, u32 row) {
  const i32 end = larger(0, smaller(batch.limit, batch.last + i32(row)));
  return {clamped(batch.first + i32(row), 0, end), end};
}
KEYFOLD_INLINE Batch load_batch(const Params& params, u32 batch) {
  if (params.batches == 0) return params.alike;
  const u64 at = params.batches + u64(batch) * sizeof(Batch);
  return {i32(load_word(at)), i32(load_word(at + 4)), i32(load_word(at + 8))};
}

// One element of the mask at any byte address, by aligned words that it touches.
KEYFOLD_INLINE float mask_value(u64 address) {
  const u32 shift = 8 * (u32(address) & 3u);
  const u64 aligned = address & ~u64(3);
  u32 bits = load_word(aligned) >> shift;
  if constexpr (kMaskType == 1) return (bits & 0xffu) != 0 ? 0.0f : hidden();
  if (kMaskType == 2 ? shift != 0 : shift > 16) bits |= load_word(aligned + 4) << (32 - shift);
  if constexpr (kMaskType == 3) return float16_value(bits);
  return __uint_as_float(kMaskType == 4 ? bits << 16 : bits);
}

// From q.k to the score. `mask` is the address of the key's element; not read for kMaskType 0.
KEYFOLD_INLINE float score(const Params& params, float product, u64 mask) {
  float s = product * params.scale;
  if constexpr (kSoftcap) s = params.softcap * tanh_precise(s);
  if constexpr (kMaskType != 0) {
    const float bias = mask_value(mask);
    s = bias == hidden() ? hidden() : (kMaskType == 1 ? s : s + bias);
  }
  return s;
}

// What weights are taken against: m, or 0 where nothing is seen.
KEYFOLD_INLINE float base_of(float m) { return m == hidden() ? 0.0f : m; }

// The factors of a state and of a later partial state.
struct Factors {
  float keep, add;
};
// A side of factor 0 is left out as a whole, as 0 times its Inf or NaN would be NaN.
KEYFOLD_INLINE float merge_values(float state, float later, Factors f) {
  const float sum = fmaf(later, f.add, state * f.keep);
  return f.add == 0.0f ? state : (f.keep == 0.0f ? later : sum);
}
KEYFOLD_INLINE float4 merge_values(float4 state, float4 later, Factors f) {
  return {merge_values(state.x, later.x, f), merge_values(state.y, later.y, f),
          merge_values(state.z, later.z, f), merge_values(state.w, later.w, f)};
}
// state, a pair (m, l), becomes that of both.
KEYFOLD_INLINE Factors merge_states(float2& state, float2 later) {
  const float m = state.x > later.x || is_nan(state.x) ? state.x : later.x;
  const Factors f{exp_nonpositive(state.x - base_of(m)), exp_nonpositive(later.x - base_of(m))};
  if (f.add == 0.0f) return {1.0f, 0.0f};
  state = {m, merge_values(state.y, later.y, f)};
  return f;
}

// Number of a row's state, and of its q.
KEYFOLD_INLINE u64 state_index(const Params& params, u32 group, u32 index) {
  return u64(group - params.block_group) * params.block_indices + index;
}
// Number of a row's partial state of a split of the wave.
KEYFOLD_INLINE u64 partial_index(const Params& params, u32 chunk_group, u32 split, u32 index) {
  return (u64(chunk_group) * params.num_splits + split) * (params.index_end - params.index_begin) +
         (index - params.index_begin);
}
KEYFOLD_INLINE u64 mask_address(const Params& params, u32 batch, u32 group, u32 index) {
  const u32 head = group % params.kv_heads * params.heads + index % params.heads;
  return params.mask + i64(batch) * params.mask_batch + i64(head) * params.mask_head +
         i64(index / params.heads) * params.mask_row;
}

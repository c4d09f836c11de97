// What every kernel shares: loading elements, exp, tanh, which keys a row sees, scores, the merge.
// fma() and `precise` keep a compiler from choosing another rounding in one kernel than in another.
#include "params.glsl"
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require

// 16 bytes of q, k, v hold kVecs groups of four elements.
const uint kVecs = kDType == 0 ? 1 : 2;
const uint kElements = 4 * kVecs;
const uint kElementSize = kDType == 0 ? 4 : 2;
const uint kHeadWords = kHeadDim / kElements;
const uint kValueWords = kValueDim / kElements;
const uint kValueVecs = kValueDim / 4;

layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer Quad { uvec4 bits; };
layout(buffer_reference, std430, buffer_reference_align = 4) readonly buffer Word { uint bits; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Vec4 { vec4 value; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Vec2 { vec2 value; };

float hidden() { return uintBitsToFloat(0xff800000u); }  // -inf, the score of an unseen key

// By their bits: a compiler may assume that comparisons meet no NaN.
bool is_nan(float x) { return (floatBitsToUint(x) & 0x7fffffffu) > 0x7f800000u; }
bool is_finite(vec4 x) {
  return all(lessThan(floatBitsToUint(x) & uvec4(0x7fffffffu), uvec4(0x7f800000u)));
}
float nan() { return uintBitsToFloat(0x7fc00000u); }

// Whether a zero came from hidden keys must not show in its sign.
vec4 positive_zero(vec4 x) {
  const uvec4 bits = floatBitsToUint(x);
  return uintBitsToFloat(mix(bits, uvec4(0), equal(bits, uvec4(0x80000000u))));
}

uvec4 load_words(uint64_t address) { return Quad(address).bits; }

// Elements 4 * part to 4 * part + 3 of a 16-byte word.
vec4 elements(uvec4 word, uint part) {
  if (kDType == 0) return uintBitsToFloat(word);
  const uvec2 pairs = part == 0 ? word.xy : word.zw;
  if (kDType == 1) return vec4(unpackHalf2x16(pairs.x), unpackHalf2x16(pairs.y));
  return uintBitsToFloat(uvec4(pairs.x << 16, pairs.x & 0xffff0000u,  //
                               pairs.y << 16, pairs.y & 0xffff0000u));
}

// exp(x) for x <= 0, as on the CPU: x = n ln2 + r with ln2 in two parts, the first so short that n
// times it is exact; a polynomial in r; 2^n by its exponent bits. At most 2 ulp; results below the
// normal range are 0; NaN gives NaN.
float exp_nonpositive(float x) {
  const float kRound = 12582912.0;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  precise float shifted = fma(x, 1.44269502, kRound);
  precise float n = shifted - kRound;
  precise float r = fma(n, -0.693145752, x);
  r = fma(n, -1.42860677e-6, r);
  precise float p = 1.3926184e-3;
  p = fma(p, r, 8.36317893e-3);
  p = fma(p, r, 4.16665561e-2);
  p = fma(p, r, 1.66665763e-1);
  p = fma(p, r, 0.5);
  p = fma(p, r, 1.0);
  p = fma(p, r, 1.0);
  precise float result = p * uintBitsToFloat((floatBitsToUint(shifted) << 23) + 0x3f800000u);
  return x < -87.3365402 ? 0.0 : result;
}

// tanh with an error of at most 4 ulp: an odd polynomial near 0, else (1 - e) / (1 + e).
float tanh_precise(float x) {
  precise float a = abs(x);
  precise float z = x * x;
  precise float p = -6.09671418e-3;
  p = fma(p, z, 2.09971797e-2);
  p = fma(p, z, -5.38509078e-2);
  p = fma(p, z, 1.33327693e-1);
  p = fma(p, z, -3.33333284e-1);
  precise float xz = x * z;
  precise float small = fma(p, xz, x);
  precise float e = exp_nonpositive(-2.0 * a);
  precise float above = 1.0 - e;
  precise float below = 1.0 + e;
  precise float quotient = above / below;
  precise float rest = fma(-quotient, below, above);  // division is allowed 2.5 ulp: one correction
  quotient = fma(rest, 1.0 / below, quotient);
  const float large = x < 0.0 ? -quotient : quotient;
  return a < 0.625 ? small : large;  // NaN takes `large`, which is NaN
}

// The keys that a row sees, before masks: [x, y) counted from the chunk's first key.
ivec2 visible(Batch batch, uint row) {
  const int end = max(0, min(batch.limit, batch.last + int(row)));
  return ivec2(clamp(batch.first + int(row), 0, end), end);
}

// One element of the mask at any byte address, by aligned words that it touches.
float mask_value(uint64_t address) {
  const uint shift = 8 * (uint(address) & 3u);
  const uint64_t aligned = address & ~uint64_t(3);
  uint bits = Word(aligned).bits >> shift;
  if (kMaskType == 1) return (bits & 0xffu) != 0 ? 0.0 : hidden();
  if (kMaskType == 2 ? shift != 0 : shift > 16) {
    bits |= Word(aligned + 4).bits << (32 - shift);
  }
  if (kMaskType == 3) return unpackHalf2x16(bits & 0xffffu).x;
  return uintBitsToFloat(kMaskType == 4 ? bits << 16 : bits);
}

// From q.k to the score. `mask` is the address of the key's element; not read for kMaskType 0.
float score(float product, uint64_t mask) {
  precise float s = product * params.scale;
  if (kSoftcap) s = params.softcap * tanh_precise(s);
  if (kMaskType != 0) {
    const float bias = mask_value(mask);
    precise float sum = s + bias;
    s = floatBitsToUint(bias) == 0xff800000u ? hidden() : (kMaskType == 1 ? s : sum);
  }
  return s;
}

// What weights are taken against: m, or 0 where nothing is seen.
float base_of(float m) { return floatBitsToUint(m) == 0xff800000u ? 0.0 : m; }

// (keep, add): the factors of the state and of a later partial state; state becomes that of both.
// A side of factor 0 is left out as a whole, as 0 times its Inf or NaN would be NaN.
vec2 merge_factors(inout vec2 state, vec2 later) {
  const float m = state.x > later.x || is_nan(state.x) ? state.x : later.x;
  precise float before = state.x - base_of(m);
  precise float after = later.x - base_of(m);
  const float keep = exp_nonpositive(before);
  const float add = exp_nonpositive(after);
  if (add == 0.0) return vec2(1.0, 0.0);
  precise float kept = state.y * keep;
  precise float sum = fma(later.y, add, kept);
  state = vec2(m, keep == 0.0 ? later.y : sum);
  return vec2(keep, add);
}
vec4 merge_values(vec4 state, vec4 later, vec2 factors) {
  precise vec4 kept = state * factors.x;
  precise vec4 sum = fma(later, vec4(factors.y), kept);
  return factors.y == 0.0 ? state : (factors.x == 0.0 ? later : sum);
}

// Number of a row's state, and of its q.
uint64_t state_index(uint group, uint index) {
  return uint64_t(group - params.block_group) * params.block_indices + index;
}
// Number of a row's partial state of a split of the wave.
uint64_t partial_index(uint chunk_group, uint split, uint index) {
  return (uint64_t(chunk_group) * params.num_splits + split) *
             (params.index_end - params.index_begin) +
         (index - params.index_begin);
}
uint64_t mask_address(uint batch, uint group, uint index) {
  const uint head = group % params.kv_heads * params.heads + index % params.heads;
  return params.mask + int64_t(batch) * params.mask_batch + int64_t(head) * params.mask_head +
         int64_t(index / params.heads) * params.mask_row;
}

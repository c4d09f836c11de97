#version 460
#extension GL_GOOGLE_include_directive : require
// Folds a wave's partial states into the running states, split after split in ascending order. What
// the fold of a split has to know of those before it is only their maximum, so that the factors of
// many splits are found side by side; what follows one by one is a multiplication and a fma.
#include "common.glsl"

// A workgroup is kRows rows of kLanes threads, each for one column at a time.
layout(constant_id = 16) const uint kRows = 1;
layout(constant_id = 17) const uint kLanes = 64;
layout(constant_id = 18) const uint kAhead = 4;   // partial states that are loaded together
layout(constant_id = 19) const uint kBatch = 64;  // splits whose factors are found together

const uint kPer = (kBatch + kLanes - 1) / kLanes;  // of them, a thread's

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Float { float value; };

shared float s_most[kRows * kBatch];    // the largest m of the batch so far
shared vec4 s_factors[kRows * kBatch];  // as of merge_factors(), l; (1, 0) keeps the state as it is

// The m of a state and a later one. Where a split is not seen it is -inf.
float larger(float m, float later) { return m > later || is_nan(m) ? m : later; }

vec2 factors_of(float before, float most, vec2 part) {
  precise float keep = before - base_of(most);
  precise float add = part.x - base_of(most);
  const vec2 factors = vec2(exp_nonpositive(keep), exp_nonpositive(add));
  return part.y < 0.0 || factors.y == 0.0 ? vec2(1.0, 0.0) : factors;
}

void main() {
  const uint lane = gl_LocalInvocationIndex % kLanes, row = gl_LocalInvocationIndex / kLanes;
  const uint index = params.index_begin + gl_WorkGroupID.x * kRows + row;
  const uint group = params.group + gl_WorkGroupID.z;
  const bool inside = index < params.index_end;
  const uint64_t at = state_index(group, index);
  vec2 state = inside ? Vec2(params.ml + 8 * at).value : vec2(0);
  // Of the row's partial states: the first, and the way from one to the next.
  const uint num_splits = params.num_splits;
  const uint64_t part = partial_index(gl_WorkGroupID.z, 0, index);
  const uint64_t step = params.index_end - params.index_begin;
  const uint64_t part_ml = params.partial_ml + 8 * part;
  const uint64_t part_o = params.partial_o + 4 * kValueDim * part;
  const uint base = row * kBatch;
  for (uint first = 0; first < num_splits; first += kBatch) {
    const uint count = min(kBatch, num_splits - first);
    vec2 parts[kPer];
    barrier();  // all have done with the batch before
    [[unroll]] for (uint j = 0; j < kPer; ++j) {
      const uint i = j * kLanes + lane;
      parts[j] = vec2(hidden(), -1.0);
      if (inside && i < count) parts[j] = Vec2(part_ml + 8 * step * (first + i)).value;
      if (i < kBatch) s_most[base + i] = parts[j].x;
    }
    barrier();
    // Each takes in the maximum of 1, 2, 4, ... before it.
    [[dont_unroll]] for (uint reach = 1; reach < kBatch; reach *= 2) {
      float most[kPer];
      [[unroll]] for (uint j = 0; j < kPer; ++j) {
        const uint i = min(j * kLanes + lane, kBatch - 1);
        most[j] = s_most[base + i];
        if (i >= reach) most[j] = larger(s_most[base + i - reach], most[j]);
      }
      barrier();
      [[unroll]] for (uint j = 0; j < kPer; ++j) {
        if (j * kLanes + lane < kBatch) s_most[base + j * kLanes + lane] = most[j];
      }
      barrier();
    }
    [[unroll]] for (uint j = 0; j < kPer; ++j) {
      const uint i = j * kLanes + lane;
      if (i >= kBatch) continue;
      const float before = i == 0 ? state.x : larger(state.x, s_most[base + i - 1]);
      s_factors[base + i] =
          vec4(factors_of(before, larger(state.x, s_most[base + i]), parts[j]), parts[j].y, 0.0);
    }
    barrier();
    // l goes the way of the columns; every thread finds it for itself.
    float l = state.y;
    for (uint column = lane; inside && column < kValueDim; column += kLanes) {
      Float place = Float(params.o + (at * kValueDim + column) * 4);
      float o = place.value;
      l = state.y;
      [[dont_unroll]] for (uint begin = 0; begin < count; begin += kAhead) {
        float later[kAhead];
        [[unroll]] for (uint i = 0; i < kAhead; ++i) {
          const uint64_t split = first + min(begin + i, count - 1);
          later[i] = Float(part_o + 4 * (kValueDim * step * split + column)).value;
        }
        [[unroll]] for (uint i = 0; i < kAhead; ++i) {
          const vec4 factors = s_factors[base + begin + i];
          const vec4 both =
              merge_values(vec4(o, l, 0.0, 0.0), vec4(later[i], factors.z, 0.0, 0.0), factors.xy);
          o = both.x;
          l = both.y;
        }
      }
      place.value = o;
    }
    state = vec2(larger(state.x, s_most[base + count - 1]), l);
  }
  if (inside && lane == 0) Vec2(params.ml + 8 * at).value = state;
}

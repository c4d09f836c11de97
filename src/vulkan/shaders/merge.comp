#version 460
#extension GL_GOOGLE_include_directive : require
// Folds a wave's partial states into the running states, split after split in ascending order. What
// the fold of a split has to know of those before it is only their maximum, so that the factors of
// many splits are found side by side; what follows one by one is a multiplication and a fma.
#include "common.glsl"

// A workgroup is kRows rows of kLanes threads, each for one column at a time.
layout(constant_id = 16) const uint kRows = 1;
layout(constant_id = 17) const uint kLanes = 64;
layout(constant_id = 18) const uint kAhead = 4;  // partial states that are loaded together

const uint kBatch = 64;  // splits whose factors are found together

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Float { float value; };

shared vec2 s_part[kRows * kBatch];     // (m, l) of the splits
shared vec2 s_factors[kRows * kBatch];  // as of merge_factors(); (1, 0) keeps the state as it is

// The state's m with a later split.
float larger(float m, vec2 part) { return part.y < 0.0 || m > part.x || is_nan(m) ? m : part.x; }

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
  for (uint first = 0; first < num_splits; first += kBatch) {
    const uint count = min(kBatch, num_splits - first);
    barrier();  // all have read the last batch, and the state that is written below
    for (uint i = lane; inside && i < count; i += kLanes) {
      s_part[row * kBatch + i] = Vec2(part_ml + 8 * step * (first + i)).value;
    }
    barrier();
    for (uint i = lane; inside && i < kBatch; i += kLanes) {
      s_factors[row * kBatch + i] = vec2(1.0, 0.0);
      if (i >= count) continue;
      float before = state.x;
      for (uint j = 0; j < i; ++j) before = larger(before, s_part[row * kBatch + j]);
      const vec2 part = s_part[row * kBatch + i];
      s_factors[row * kBatch + i] = factors_of(before, larger(before, part), part);
    }
    barrier();
    for (uint column = lane; inside && column < kValueDim; column += kLanes) {
      Float place = Float(params.o + (at * kValueDim + column) * 4);
      vec4 o = vec4(place.value);
      [[dont_unroll]] for (uint begin = 0; begin < count; begin += kAhead) {
        float later[kAhead];
        [[unroll]] for (uint i = 0; i < kAhead; ++i) {
          const uint64_t split = first + min(begin + i, count - 1);
          later[i] = Float(part_o + 4 * (kValueDim * step * split + column)).value;
        }
        [[unroll]] for (uint i = 0; i < kAhead; ++i) {
          o = merge_values(o, vec4(later[i]), s_factors[row * kBatch + begin + i]);
        }
      }
      place.value = o.x;
    }
    for (uint i = 0; inside && i < count; ++i) {
      const vec2 part = s_part[row * kBatch + i], factors = s_factors[row * kBatch + i];
      state.x = larger(state.x, part);
      state.y = merge_values(vec4(state.y), vec4(part.y), factors).x;
    }
  }
  if (inside && lane == 0) Vec2(params.ml + 8 * at).value = state;
}

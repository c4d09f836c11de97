#version 460
#extension GL_GOOGLE_include_directive : require
// Folds a wave's partial states into the running states, split after split in ascending order. What
// the fold of a split has to know of those before it is only their maximum, so that the factors of
// many splits are found side by side; what follows one by one is a multiplication and a fma.
#include "common.glsl"

layout(constant_id = 16) const uint kThreads = 64;

// Rows of a workgroup; x is the tile of rows, z the group in the chunk.
const uint kRows = kThreads / kValueVecs > 0 ? kThreads / kValueVecs : 1;
const uint kLanes = kThreads / kRows;  // of a row
// Partial states that are loaded together; splits whose factors are found together.
const uint kAhead = kRows > 8 ? 8 : 16, kBatch = kRows > 8 ? 8 : 64;

shared vec2 s_part[kRows * kBatch];     // their (m, l)
shared float s_most[kRows * kBatch];    // the state's m with them
shared vec2 s_factors[kRows * kBatch];  // as of merge_factors(); (1, 0) keeps the state as it is
shared vec2 s_state[kRows];

// The state's m with a later one.
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
  const bool inside = row < kRows && index < params.index_end;
  const uint64_t at = state_index(group, index);
  if (inside && lane == 0) s_state[row] = Vec2(params.ml + 8 * at).value;
  for (uint first = 0; first < params.num_splits; first += kBatch) {
    const uint count = min(kBatch, params.num_splits - first);
    barrier();
    for (uint i = lane; inside && i < count; i += kLanes) {
      const uint64_t from = partial_index(gl_WorkGroupID.z, first + i, index);
      s_part[row * kBatch + i] = Vec2(params.partial_ml + 8 * from).value;
    }
    barrier();
    const vec2 before = inside ? s_state[row] : vec2(0);
    if (inside && lane == 0) {
      float m = before.x;
      for (uint i = 0; i < count; ++i) {
        m = larger(m, s_part[row * kBatch + i]);
        s_most[row * kBatch + i] = m;
      }
    }
    barrier();
    for (uint i = lane; inside && i < count; i += kLanes) {
      const uint j = row * kBatch + i;
      s_factors[j] = factors_of(i == 0 ? before.x : s_most[j - 1], s_most[j], s_part[j]);
    }
    barrier();
    if (inside && lane == 0) {
      precise float l = before.y;
      for (uint i = 0; i < count; ++i) {
        const vec2 f = s_factors[row * kBatch + i];
        const float later = s_part[row * kBatch + i].y;
        precise float kept = l * f.x;
        precise float sum = fma(later, f.y, kept);
        l = f.y == 0.0 ? l : (f.x == 0.0 ? later : sum);
      }
      s_state[row] = vec2(s_most[row * kBatch + count - 1], l);
    }
    for (uint column = lane; inside && column < kValueVecs; column += kLanes) {
      Vec4 place = Vec4(params.o + (at * kValueVecs + column) * 16);
      vec4 o = place.value;
      for (uint i = 0; i < count; i += kAhead) {
        vec4 later[kAhead];
        [[unroll]] for (uint j = 0; j < kAhead; ++j) {
          const uint split = min(first + i + j, params.num_splits - 1);
          const uint64_t from = partial_index(gl_WorkGroupID.z, split, index);
          later[j] = Vec4(params.partial_o + (from * kValueVecs + column) * 16).value;
        }
        [[unroll]] for (uint j = 0; j < kAhead; ++j) {
          if (i + j < count) o = merge_values(o, later[j], s_factors[row * kBatch + i + j]);
        }
      }
      place.value = o;
    }
  }
  if (inside && lane == 0) Vec2(params.ml + 8 * at).value = s_state[row];
}

#version 460
#extension GL_GOOGLE_include_directive : require
// Folds a wave's partial states into the running states, split after split in ascending order.
#include "common.glsl"

layout(constant_id = 16) const uint kThreads = 64;

const uint kAhead = 8;  // partial states that are loaded together

// Rows of a workgroup; x is the tile of rows, z the group in the chunk.
const uint kRows = kThreads / kValueVecs > 0 ? kThreads / kValueVecs : 1;
const uint kLanes = kThreads / kRows;  // of a row

void main() {
  const uint lane = gl_LocalInvocationIndex % kLanes, row = gl_LocalInvocationIndex / kLanes;
  const uint index = params.index_begin + gl_WorkGroupID.x * kRows + row;
  const uint group = params.group + gl_WorkGroupID.z;
  const bool inside = row < kRows && index < params.index_end;
  const uint64_t at = state_index(group, index);
  vec2 before = vec2(0), state = vec2(0);
  if (inside) before = Vec2(params.ml + 8 * at).value;
  barrier();  // all lanes have read what the first one writes
  if (!inside) return;
  for (uint column = lane; column < kValueVecs; column += kLanes) {
    Vec4 place = Vec4(params.o + (at * kValueVecs + column) * 16);
    vec4 o = place.value;
    state = before;
    for (uint first = 0; first < params.num_splits; first += kAhead) {
      vec2 part[kAhead];
      vec4 later[kAhead];
      [[unroll]] for (uint i = 0; i < kAhead; ++i) {
        const uint split = min(first + i, params.num_splits - 1);
        const uint64_t from = partial_index(gl_WorkGroupID.z, split, index);
        part[i] = Vec2(params.partial_ml + 8 * from).value;
        later[i] = Vec4(params.partial_o + (from * kValueVecs + column) * 16).value;
      }
      [[unroll]] for (uint i = 0; i < kAhead; ++i) {
        if (first + i >= params.num_splits || part[i].y < 0.0) continue;
        const vec2 factors = merge_factors(state, part[i]);
        o = merge_values(o, later[i], factors);
      }
    }
    place.value = o;
  }
  if (lane == 0) Vec2(params.ml + 8 * at).value = state;
}

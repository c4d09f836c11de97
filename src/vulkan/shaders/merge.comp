#version 460
#extension GL_GOOGLE_include_directive : require
// Folds a wave's partial states into the running states, split after split in ascending order.
#include "common.glsl"

layout(constant_id = 16) const uint kThreads = 64;

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
    for (uint split = 0; split < params.num_splits; ++split) {
      const uint64_t from = partial_index(gl_WorkGroupID.z, split, index);
      const vec2 part = Vec2(params.partial_ml + 8 * from).value;
      const vec4 later = Vec4(params.partial_o + (from * kValueVecs + column) * 16).value;
      if (part.y < 0.0) continue;
      const vec2 factors = merge_factors(state, part);
      o = merge_values(o, later, factors);
    }
    place.value = o;
  }
  if (lane == 0) Vec2(params.ml + 8 * at).value = state;
}

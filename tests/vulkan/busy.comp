// Keeps a device busy for as long as it has groups of this.
#version 450
#extension GL_EXT_buffer_reference : require

layout(local_size_x = 1) in;
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Result { uint value; };
layout(push_constant) uniform Push { Result result; };

void main() {
  uint x = gl_WorkGroupID.x;
  // Mesa 22's llvmpipe ends a loop after 65535 rounds.
  for (uint i = 0; i < 30000u; ++i) x = x * 1664525u + 1013904223u;
  // Almost never, but the compiler does not know.
  if (x == 0u) result.value = x;
}

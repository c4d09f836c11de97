#version 460
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_scalar_block_layout : require
// Which elements of a 16x16 accumulator a lane has: no specification tells. One subgroup writes,
// lane by lane, their number, then the row of each.
layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;

const uint kSize = 16;

layout(buffer_reference, scalar, buffer_reference_align = 4) writeonly buffer Rows { float at[]; };
layout(push_constant, scalar) uniform Push { Rows rows; };

shared vec4 s_rows[kSize * kSize / 4];

void main() {
  for (uint i = gl_SubgroupInvocationID; i < kSize * kSize / 4; i += gl_SubgroupSize) {
    s_rows[i] = vec4(i * 4 / kSize);
  }
  barrier();
  coopmat<float, gl_ScopeSubgroup, kSize, kSize, gl_MatrixUseAccumulator> row;
  coopMatLoad(row, s_rows, 0, kSize / 4, gl_CooperativeMatrixLayoutRowMajor);
  const uint begin = gl_SubgroupInvocationID * (row.length() + 1);
  rows.at[begin] = float(row.length());
  for (uint e = 0; e < row.length(); ++e) rows.at[begin + 1 + e] = row[e];
}

// What one chunk's kernels are told. src/vulkan/params.hpp is the C++ twin: the same fields in the
// same order. Addresses are bufferDeviceAddress values, strides count bytes.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_control_flow_attributes : require

// Rows of a group are numbered with the query heads of the group innermost:
//   index = (row - first row of the block) * heads + head in the group.
// Positions of keys count from the chunk's first key, which starts a split.
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Params {
  uint64_t q;       // [groups of the block][rows * heads][head_dim, padded], dense
  uint64_t k;       // the chunk's first key of batch entry 0, head 0; see the strides
  uint64_t v;       //
  int64_t k_batch;  // rows of k and v are dense and 16-byte aligned
  int64_t k_head;   //
  int64_t k_key;    //
  int64_t v_batch;  //
  int64_t v_head;   //
  int64_t v_key;    //
  uint64_t mask;    // of batch entry 0, head 0, the block's first row, the chunk's first key
  int64_t mask_batch;
  int64_t mask_head;  // of the query head
  int64_t mask_row;
  int64_t mask_key;
  uint64_t o;           // float [groups of the block][rows * heads][value_dim, padded]: the state
  uint64_t ml;          // vec2 (m, l) [groups of the block][rows * heads]
  uint64_t partial_o;   // float [groups of the chunk][splits of the wave][indices of the
                        // chunk][value_dim, padded]
  uint64_t partial_ml;  // vec2; l < 0: these rows see nothing of the split
  uint64_t batches;     // Batch [batch]
  float scale;          // on q.k; with a softcap: scale / softcap
  float softcap;
  uint heads;          // query heads in a group
  uint kv_heads;       // groups in a batch entry
  uint block_group;    // the block's first group, absolute
  uint block_indices;  // rows * heads of the block
  uint group;          // the chunk's first group, absolute
  uint index_begin;    // the chunk's indices
  uint index_end;
  uint num_keys;    // of the chunk
  uint split;       // the wave's first split, counted from the chunk's first key
  uint num_splits;  // splits of the wave
};

// The keys that the rows of a batch entry see: row r of the block sees [r + first, r + last),
// inside [0, limit). Counted from the chunk's first key; first and last within +-2^30.
struct Batch {
  int first;
  int last;
  int limit;  // keys at or behind it are never read; 0 to num_keys
};
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Batches {
  Batch at[];
};

layout(push_constant, scalar) uniform Push { Params params; };

// The same in every kernel; what else a kernel takes begins at 16.
layout(local_size_x_id = 0, local_size_y = 1, local_size_z = 1) in;
layout(constant_id = 1) const uint kDType = 0;      // of q, k, v: 0 float32, 1 float16, 2 bfloat16
layout(constant_id = 2) const uint kHeadDim = 64;   // padded to whole 16-byte words
layout(constant_id = 3) const uint kValueDim = 64;  // padded to whole 16-byte words
layout(constant_id = 4) const uint kMaskType =
    0;  // 0 none, 1 bool, 2 float32, 3 float16, 4 bfloat16
layout(constant_id = 5) const bool kSoftcap = false;
layout(constant_id = 6) const uint kSplitLen = 512;

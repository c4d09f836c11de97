// What one chunk's kernels are told. src/gpu/params.hpp, and Launch::Arguments, are the C++ twin:
// the same fields in the same order. Strides count bytes.
#pragma once

#include "types.cuh"

// The keys that the rows of a batch entry see: row r of the block sees [r + first, r + last),
// inside [0, limit). Counted from the chunk's first key; first and last within +-2^30.
struct Batch {
  i32 first;
  i32 last;
  i32 limit;  // keys at or behind it are never read; 0 to num_keys
};

// Rows of a group are numbered with the query heads of the group innermost:
//   index = (row - first row of the block) * heads + head in the group.
// Positions of keys count from the chunk's first key, which starts a split.
struct Params {
  u64 q;        // [groups of the block][rows * heads][head_dim, padded], dense
  u64 k;        // the chunk's first key of batch entry 0, head 0; see the strides
  u64 v;        //
  i64 k_batch;  // rows of k and v are dense and 16-byte aligned
  i64 k_head;   //
  i64 k_key;    //
  i64 v_batch;  //
  i64 v_head;   //
  i64 v_key;    //
  u64 mask;     // of batch entry 0, head 0, the block's first row, the chunk's first key
  i64 mask_batch;
  i64 mask_head;  // of the query head
  i64 mask_row;
  i64 mask_key;
  u64 o;           // float [groups of the block][rows * heads][value_dim, padded]: the state
  u64 ml;          // float2 (m, l) [groups of the block][rows * heads]
  u64 partial_o;   // float [groups of the chunk][splits of the wave][indices of the
                   // chunk][value_dim, padded]
  u64 partial_ml;  // float2; l < 0: these rows see nothing of the split
  u64 batches;     // Batch [batch]; 0: all are as `alike`
  float scale;     // on q.k; with a softcap: scale / softcap
  float softcap;
  u32 heads;          // query heads in a group
  u32 kv_heads;       // groups in a batch entry
  u32 block_group;    // the block's first group, absolute
  u32 block_indices;  // rows * heads of the block
  u32 group;          // the chunk's first group, absolute
  u32 index_begin;    // the chunk's indices
  u32 index_end;
  u32 num_keys;    // of the chunk
  u32 split;       // the wave's first split, counted from the chunk's first key
  u32 num_splits;  // splits of the wave
  Batch alike;
};
static_assert(sizeof(Params) == 19 * 8 + 16 * 4, "as in Launch::Arguments");

// What every kernel is compiled for.
constexpr u32 kThreads = KEYFOLD_THREADS;
constexpr u32 kDType = KEYFOLD_DTYPE;         // of q, k, v: 0 float32, 1 float16, 2 bfloat16
constexpr u32 kHeadDim = KEYFOLD_HEAD_DIM;    // padded to whole 16-byte words
constexpr u32 kValueDim = KEYFOLD_VALUE_DIM;  // padded to whole 16-byte words
constexpr u32 kMaskType = KEYFOLD_MASK_TYPE;  // 0 none, 1 bool, 2 float32, 3 float16, 4 bfloat16
constexpr bool kSoftcap = KEYFOLD_SOFTCAP;
constexpr u32 kSplitLen = KEYFOLD_SPLIT_LEN;

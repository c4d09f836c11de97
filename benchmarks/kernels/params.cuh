#pragma once
struct Params {
  unsigned long long q, k, v;
  long long k_batch, k_head, k_key, v_batch, v_head, v_key;
  unsigned long long mask;
  long long mask_batch, mask_head, mask_row, mask_key;
  unsigned long long o, ml, partial_o, partial_ml, batches;
  float scale, softcap;
  unsigned heads, kv_heads, block_group, block_indices, group, index_begin, index_end, num_keys,
      split, num_splits;
};
struct Batch {
  int first, last, limit;
};

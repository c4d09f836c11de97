// What one chunk's kernels are told: the twin of src/vulkan/shaders/params.glsl,
// which explains each field.
#pragma once

#include <cstdint>

namespace keyfold::gpu {

using Address = std::uint64_t;

struct Params {
  Address q = 0, k = 0, v = 0;
  std::int64_t k_batch = 0, k_head = 0, k_key = 0;
  std::int64_t v_batch = 0, v_head = 0, v_key = 0;
  Address mask = 0;
  std::int64_t mask_batch = 0, mask_head = 0, mask_row = 0, mask_key = 0;
  Address o = 0, ml = 0;
  Address partial_o = 0, partial_ml = 0;
  Address batches = 0;
  float scale = 1, softcap = 0;
  std::uint32_t heads = 1, kv_heads = 1;
  std::uint32_t block_group = 0, block_indices = 0;
  std::uint32_t group = 0, index_begin = 0, index_end = 0;
  std::uint32_t num_keys = 0, split = 0, num_splits = 0;
};
static_assert(sizeof(Params) == 19 * 8 + 12 * 4);

/// The keys that the rows of a batch entry see.
struct Batch {
  std::int32_t first = 0, last = 0, limit = 0;
};

}  // namespace keyfold::gpu

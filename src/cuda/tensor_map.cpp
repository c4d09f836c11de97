// Sizes, strides and swizzles.
#include "cuda/tensor_map.hpp"

#include <algorithm>
#include <vector>

#include "gpu/kernel_options.hpp"
#include "gpu/layout.hpp"

namespace keyfold::cuda {
namespace {

CUtensorMapDataType map_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

CUtensorMapSwizzle swizzle_of(std::int64_t bytes) {
  switch (bytes) {
    case 32: return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128: return CU_TENSOR_MAP_SWIZZLE_128B;
    default: return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

TensorMaps encode_tensor_maps(const Driver& driver, const core::Problem& problem,
                              const TensorTiles& tiles, const core::Block& block,
                              const gpu::Params& p, const TensorRows& q) {
  const AttentionShape& s = problem.shape;
  const std::int64_t size = size_of(s.dtype);
  /// `box` and `sizes` of columns, rows, ...; `strides` of rows, ..., in bytes.
  const auto encode = [&](DType dtype, gpu::Address address, std::vector<cuuint32_t> box,
                          const std::vector<std::int64_t>& sizes,
                          const std::vector<std::int64_t>& strides) {
    std::vector<cuuint64_t> dims(sizes.begin(), sizes.end()), steps(strides.begin(), strides.end());
    // Where all heads or batch entries are one, the stride is 0: the map has one, and kernels ask
    // for that one.
    for (std::size_t i = 0; i < steps.size(); ++i)
      if (steps[i] == 0) dims[i + 1] = 1, steps[i] = 16;
    box.resize(sizes.size(), 1);
    const std::vector<cuuint32_t> ones(sizes.size(), 1);
    CUtensorMap map{};
    driver.tensor_map_encode_tiled(
        &map, map_type(dtype), static_cast<cuuint32_t>(sizes.size()),
        reinterpret_cast<void*>(address),  // NOLINT(performance-no-int-to-ptr)
        dims.data(), steps.data(), box.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle_of(box[0] * size_of(dtype)), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return map;
  };
  const std::int64_t head = gpu::padded_dim(s.dtype, s.head_dim),
                     value = gpu::padded_dim(s.dtype, s.value_dim);
  const std::int64_t indices = p.block_indices, keys = p.num_keys;
  const auto queries = [&] {
    if (q.at == 0) {
      return encode(s.dtype, p.q, {tiles.columns, 1, tiles.q_rows},
                    {head, 1, indices, block.group_end - block.group_begin, 1},
                    {0, head * size, indices * head * size, 0});
    }
    return encode(s.dtype, q.at, {tiles.columns, p.heads, tiles.q_rows / p.heads},
                  {s.head_dim, p.heads, s.q_len - block.row_begin, s.num_kv_heads, s.batch},
                  {q.head, q.row, q.group, q.batch});
  };
  TensorMaps maps{queries(),
                  encode(s.dtype, p.k, {tiles.columns, tiles.k_rows},
                         {head, keys, s.num_kv_heads, s.batch}, {p.k_key, p.k_head, p.k_batch}),
                  encode(s.dtype, p.v, {tiles.columns, tiles.v_rows},
                         {value, keys, s.num_kv_heads, s.batch}, {p.v_key, p.v_head, p.v_batch})};
  if (tiles.mask_keys != 0) {
    // Rows behind the chunk's need not be there.
    maps[3] =
        encode(problem.mask->dtype, p.mask, {tiles.mask_keys, tiles.mask_heads, tiles.mask_rows},
               {keys, s.num_heads, gpu::ceil_div(p.index_end, p.heads), s.batch},
               {p.mask_head, p.mask_row, p.mask_batch});
  }
  return maps;
}

bool maps_mask(const core::Problem& problem, const gpu::Params& p) {
  const std::int64_t size = size_of(problem.mask->dtype), row = p.num_keys * size;
  if (p.mask % 16 != 0 || p.mask_key != size) return false;
  return std::ranges::all_of(std::array{p.mask_batch, p.mask_head, p.mask_row}, [&](auto stride) {
    return stride == 0 || (stride % 16 == 0 && stride >= row && stride < std::int64_t{1} << 40);
  });
}

bool maps_queries(const core::Problem& problem, const TensorTiles& tiles, const TensorRows& q) {
  const AttentionShape& s = problem.shape;
  // A map's strides are not 0, nor are they larger than 2^40.
  const auto steps = [](std::int64_t count, std::int64_t stride) {
    return count == 1 || (stride > 0 && stride < std::int64_t{1} << 40);
  };
  return in_words(q, s.dtype, s.head_dim) && tiles.q_rows % problem.group_size() == 0 &&
         steps(problem.group_size(), q.head) && steps(s.q_len, q.row) &&
         steps(s.num_kv_heads, q.group) && steps(s.batch, q.batch);
}

}  // namespace keyfold::cuda

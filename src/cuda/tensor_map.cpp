// Sizes, strides and swizzles.
#include "cuda/tensor_map.hpp"

#include <vector>

#include "gpu/kernel_options.hpp"

namespace keyfold::cuda {
namespace {

CUtensorMapDataType type_of(DType dtype) {
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
                              const TensorTiles& tiles, std::int64_t groups, const gpu::Params& p) {
  const AttentionShape& s = problem.shape;
  const std::int64_t size = size_of(s.dtype);
  /// `sizes` of columns, rows, ...; `strides` of rows, ..., in bytes.
  const auto encode = [&](gpu::Address address, std::uint32_t rows,
                          const std::vector<std::int64_t>& sizes,
                          const std::vector<std::int64_t>& strides) {
    std::vector<cuuint64_t> dims(sizes.begin(), sizes.end()), steps(strides.begin(), strides.end());
    // Where all heads or batch entries are one, the stride is 0: the map has one, and kernels ask
    // for that one.
    for (std::size_t i = 0; i < steps.size(); ++i)
      if (steps[i] == 0) dims[i + 1] = 1, steps[i] = 16;
    std::vector<cuuint32_t> box(sizes.size(), 1), ones(sizes.size(), 1);
    box[0] = tiles.columns;
    box[1] = rows;
    CUtensorMap map{};
    driver.tensor_map_encode_tiled(
        &map, type_of(s.dtype), static_cast<cuuint32_t>(sizes.size()),
        reinterpret_cast<void*>(address),  // NOLINT(performance-no-int-to-ptr)
        dims.data(), steps.data(), box.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle_of(tiles.columns * size), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return map;
  };
  const std::int64_t head = gpu::padded_dim(s.dtype, s.head_dim),
                     value = gpu::padded_dim(s.dtype, s.value_dim);
  const std::int64_t indices = p.block_indices, keys = p.num_keys;
  return {encode(p.q, tiles.q_rows, {head, indices, groups}, {head * size, indices * head * size}),
          encode(p.k, tiles.k_rows, {head, keys, s.num_kv_heads, s.batch},
                 {p.k_key, p.k_head, p.k_batch}),
          encode(p.v, tiles.v_rows, {value, keys, s.num_kv_heads, s.batch},
                 {p.v_key, p.v_head, p.v_batch})};
}

}  // namespace keyfold::cuda

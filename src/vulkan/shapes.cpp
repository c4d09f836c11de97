// Constants of the kernels.
#include "vulkan/shapes.hpp"

namespace keyfold::vulkan {
namespace {

/// kMaskType of shaders/params.glsl.
std::uint32_t mask_type(const core::Problem& problem) {
  if (!problem.mask) return 0;
  switch (problem.mask->dtype) {
    case DType::kBool: return 1;
    case DType::kFloat32: return 2;
    case DType::kFloat16: return 3;
    case DType::kBFloat16: return 4;
  }
  return 0;
}

}  // namespace

Shapes::Shapes(const core::Problem& problem, const Traits& traits) : problem_(problem) {
  const ShapeQuery query{.dtype = problem.shape.dtype,
                         .head_dim = problem.shape.head_dim,
                         .value_dim = problem.shape.value_dim,
                         .subgroup_size = traits.subgroup_size,
                         .max_shared_bytes = traits.max_shared_bytes,
                         .max_workgroup_invocations = traits.max_invocations};
  merge_ = merge_shape(query);
  if (decode(problem)) {
    decode_ = decode_shape(query);
    tile_rows_ = decode_.rows(problem.shape.q_len * problem.group_size());
  } else {
    attend_ = attend_shape(query);
    tile_rows_ = attend_.rows();
  }
}

Constants Shapes::constants(Kernel kernel, bool partial) const {
  const AttentionShape& s = problem_.shape;
  std::uint32_t workgroup = 0;
  std::vector<std::uint32_t> own;
  switch (kernel) {
    case Kernel::kAttend:
      workgroup = attend_.workgroup();
      own = attend_.constants(partial);
      break;
    case Kernel::kDecode:
      workgroup = decode_.workgroup();
      own = decode_.constants(tile_rows_);
      break;
    case Kernel::kMerge:
      workgroup = merge_.workgroup();
      own = merge_.constants();
      break;
  }
  Constants all{{0, workgroup},
                {1, static_cast<std::uint32_t>(s.dtype)},
                {2, padded_dim(s.dtype, s.head_dim)},
                {3, padded_dim(s.dtype, s.value_dim)},
                {4, mask_type(problem_)},
                {5, problem_.softcap > 0 ? 1u : 0u},
                {6, static_cast<std::uint32_t>(split_len(problem_))}};
  for (std::uint32_t i = 0; i < own.size(); ++i) all.emplace_back(16 + i, own[i]);
  return all;
}

}  // namespace keyfold::vulkan

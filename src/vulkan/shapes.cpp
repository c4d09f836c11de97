// Constants of the kernels.
#include "vulkan/shapes.hpp"

#include <stdexcept>

#include "gpu/kernel_options.hpp"

namespace keyfold::vulkan {
namespace {

ShapeQuery query_of(DType dtype, std::int64_t head_dim, std::int64_t value_dim,
                    const Traits& traits) {
  return {.dtype = dtype,
          .head_dim = head_dim,
          .value_dim = value_dim,
          .subgroup_size = traits.subgroup_size,
          .max_shared_bytes = traits.max_shared_bytes,
          .max_workgroup_invocations = traits.max_invocations,
          .pairs = traits.expects_pairs()};
}

}  // namespace

std::vector<std::string> kernel_names(const Traits& traits) {
  std::vector<std::string> names;
  if (traits.matrices.nv2) names.emplace_back("matrix2");
  if (traits.matrices.any()) names.emplace_back("matrix");
  names.emplace_back("scalar");
  return names;
}

std::string selected_kernel(const Traits& traits) {
  return gpu::kernel_by_name("KEYFOLD_VULKAN_KERNEL", kernel_names(traits), traits.name);
}

std::int64_t max_head_dim(const Traits& traits) {
  constexpr std::int64_t kMost = 576, kStep = 32;
  for (std::int64_t dim = kMost; dim > kStep; dim -= kStep) {
    try {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
        const ShapeQuery query = query_of(dtype, dim, dim, traits);
        attend_shape(query);
        decode_shape(query);
      }
      return dim;
    } catch (const std::invalid_argument&) {  // a smaller one
      continue;
    }
  }
  return kStep;
}

Shapes::Shapes(const core::Problem& problem, const Traits& traits) : problem_(problem) {
  const AttentionShape& shape = problem.shape;
  const ShapeQuery query = query_of(shape.dtype, shape.head_dim, shape.value_dim, traits);
  merge_ = merge_shape(query, shape.q_len <= kFewRows);
  if (shape.q_len <= kFewRows) {
    main_ = Kernel::kDecode;
    decode_ = decode_shape(query);
    tile_rows_ = decode_.rows(shape.q_len * problem.group_size());
    return;
  }
  if (const std::string name = selected_kernel(traits); name != "scalar") {
    choose_matrices(query, traits.matrices, name);
  }
  if (!matrices()) {
    attend_ = attend_shape(query);
    tile_rows_ = attend_.rows();
  }
}

void Shapes::choose_matrices(const ShapeQuery& query, const MatrixTraits& traits,
                             const std::string& name) {
  const bool half = query.dtype == DType::kFloat16, two = name == "matrix2";
  if (query.dtype == DType::kFloat32) return;
  const std::uint32_t size = half ? traits.float16 : traits.bfloat16;
  const auto shape = size == 0 ? std::nullopt : matrix_shape(query, size, two);
  if (!shape) return;
  matrix_ = *shape;
  tile_rows_ = matrix_.rows();
  name_ = name;
  main_ = two ? (half ? Kernel::kMatrix2Float16 : Kernel::kMatrix2BFloat16)
              : (half ? Kernel::kMatrixFloat16 : Kernel::kMatrixBFloat16);
}

std::int64_t Shapes::split_len() const {
  return decode() ? kDecodeSplitLen : matrices() ? kMatrixSplitLen : kPrefillSplitLen;
}

Constants Shapes::common(std::uint32_t workgroup) const {
  const AttentionShape& s = problem_.shape;
  return {{0, workgroup},
          {1, static_cast<std::uint32_t>(s.dtype)},
          {2, gpu::padded_dim(s.dtype, s.head_dim)},
          {3, gpu::padded_dim(s.dtype, s.value_dim)},
          {4, gpu::mask_type(problem_)},
          {5, problem_.softcap > 0 ? 1u : 0u},
          {6, static_cast<std::uint32_t>(split_len())}};
}

Constants Shapes::constants(Kernel kernel, bool partial, std::uint32_t pairs) const {
  std::uint32_t workgroup = 0;
  std::vector<std::uint32_t> own;
  if (kernel == Kernel::kMerge) {
    workgroup = merge_.workgroup();
    own = merge_.constants();
  } else if (decode()) {
    workgroup = decode_.workgroup();
    own = decode_.constants(tile_rows_);
  } else if (matrices()) {
    const bool finished = gpu::finishes_scores(problem_);
    workgroup = matrix_.workgroup();
    own = matrix_.constants(partial ? 1 : 0, finished ? 1 : 0, matrix_.size == 16 ? pairs : 0);
  } else {
    workgroup = attend_.workgroup();
    own = attend_.constants(partial);
  }
  Constants all = common(workgroup);
  for (std::uint32_t i = 0; i < own.size(); ++i) all.emplace_back(16 + i, own[i]);
  return all;
}

}  // namespace keyfold::vulkan

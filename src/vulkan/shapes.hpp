// The kernels of a problem on a device: rows of a workgroup, specialization constants.
#pragma once

#include <string>
#include <vector>

#include "core/problem.hpp"
#include "gpu/layout.hpp"
#include "vulkan/kernel_shape.hpp"
#include "vulkan/pipelines.hpp"
#include "vulkan/traits.hpp"

namespace keyfold::vulkan {

/// The kernels of 16-bit prefill that a device can run, the fastest first: "matrix2"
/// (VK_NV_cooperative_matrix2), "matrix" (VK_KHR_cooperative_matrix), "scalar".
std::vector<std::string> kernel_names(const Traits& traits);
/// KEYFOLD_VULKAN_KERNEL, else the first of them. Throws InvalidArgument for another.
std::string selected_kernel(const Traits& traits);

/// The largest head_dim and value_dim that every call may have on a device.
std::int64_t max_head_dim(const Traits& traits);

class Shapes {
 public:
  /// Throws as selected_kernel().
  Shapes(const core::Problem& problem, const Traits& traits);

  /// The kernel that meets the keys: kAttend, kDecode, or one on matrices.
  Kernel main() const { return main_; }
  const std::string& name() const { return name_; }
  bool decode() const { return main_ == Kernel::kDecode; }
  bool matrices() const { return matrix_.size != 0; }
  std::int64_t split_len() const;
  gpu::Tiling tiling() const { return {split_len(), tile_rows_, decode()}; }
  std::int64_t tile_rows() const { return tile_rows_; }
  std::int64_t merge_rows() const { return merge_.rows; }
  /// Of main() or of kMerge. `pairs` as row_pairs(), for kernels on matrices.
  Constants constants(Kernel kernel, bool partial, std::uint32_t pairs = 0) const;

 private:
  static constexpr std::int64_t kFewRows = 8;  // that decode takes; q_len alone decides

  void choose_matrices(const ShapeQuery& query, const MatrixTraits& traits,
                       const std::string& name);
  Constants common(std::uint32_t workgroup) const;

  const core::Problem& problem_;
  Kernel main_ = Kernel::kAttend;
  std::string name_ = "scalar";
  AttendShape attend_;
  MatrixShape matrix_;
  DecodeShape decode_;
  MergeShape merge_;
  std::uint32_t tile_rows_ = 0;
};

}  // namespace keyfold::vulkan

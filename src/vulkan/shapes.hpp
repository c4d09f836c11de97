// The kernels of a problem on a device: rows of a workgroup, specialization constants.
#pragma once

#include "core/problem.hpp"
#include "vulkan/kernel_shape.hpp"
#include "vulkan/pipelines.hpp"
#include "vulkan/traits.hpp"

namespace keyfold::vulkan {

class Shapes {
 public:
  Shapes(const core::Problem& problem, const Traits& traits);

  /// Whether the decode kernel runs; q_len alone decides.
  static bool decode(const core::Problem& problem) { return problem.shape.q_len <= kFewRows; }
  static std::int64_t split_len(const core::Problem& problem) {
    return decode(problem) ? kDecodeSplitLen : kPrefillSplitLen;
  }

  std::int64_t tile_rows() const { return tile_rows_; }
  std::int64_t merge_rows() const { return merge_.rows; }
  Constants constants(Kernel kernel, bool partial) const;

 private:
  static constexpr std::int64_t kFewRows = 8;

  const core::Problem& problem_;
  AttendShape attend_;
  DecodeShape decode_;
  MergeShape merge_;
  std::uint32_t tile_rows_ = 0;
};

}  // namespace keyfold::vulkan

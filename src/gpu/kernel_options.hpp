// What the kernels of both backends are compiled for, and the choice among them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.hpp"

namespace keyfold::gpu {

/// Elements of a row as it is stored: `dim` padded to whole 16-byte words.
std::uint32_t padded_dim(DType dtype, std::int64_t dim);

/// kMaskType of the kernels: 0 none, 1 bool, 2 float32, 3 float16, 4 bfloat16.
std::uint32_t mask_type(const core::Problem& problem);

/// Whether scores have to be finished before their maximum is taken: where they are more than
/// products times a scale, or the scale turns their order around.
bool finishes_scores(const core::Problem& problem);

/// The kernel that the environment variable names, else the first. Throws InvalidArgument for
/// one that `device` does not have.
std::string kernel_by_name(const char* variable, const std::vector<std::string>& names,
                           const std::string& device);

}  // namespace keyfold::gpu

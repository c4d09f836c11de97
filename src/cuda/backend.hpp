// The CUDA backend: NVIDIA GPUs by the driver's own interface, kernels compiled at run time.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.hpp"

namespace keyfold::cuda {

/// One backend for each GPU that the driver lists: "cuda", "cuda:1", ... Empty where no driver or
/// no GPU is found; never throws for that. Where something else is missing, the backend is there
/// and its unsupported() says what.
std::vector<std::shared_ptr<core::Backend>> make_backends();

}  // namespace keyfold::cuda

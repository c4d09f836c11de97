// The CPU backend: SIMD kernels chosen at run time, oneTBB threads.
#pragma once

#include <memory>

#include "core/backend.hpp"

namespace keyfold::cpu {

std::shared_ptr<core::Backend> make_backend();

}  // namespace keyfold::cpu

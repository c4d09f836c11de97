// The Vulkan backend: any GPU with Vulkan 1.2, each chunk a submission of its own.
#pragma once

#include <memory>
#include <vector>

#include "core/backend.hpp"

namespace keyfold::vulkan {

/// One backend for each usable GPU, the fastest kind first: "vulkan", "vulkan:1", ... Empty where
/// no loader, no driver or no usable GPU is found; never throws for that.
std::vector<std::shared_ptr<core::Backend>> make_backends();

}  // namespace keyfold::vulkan

// The kernels as SPIR-V.
#pragma once

#include <cstdint>
#include <span>

namespace keyfold::vulkan {

enum class Kernel : std::uint8_t;

std::span<const std::uint32_t> shader(Kernel kernel);

}  // namespace keyfold::vulkan

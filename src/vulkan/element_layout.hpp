// Which elements of a cooperative matrix a lane has.
#pragma once

#include <cstdint>
#include <memory>

#include "vulkan/device.hpp"

namespace keyfold::vulkan {

/// row_pairs() of the device's accumulators. No specification tells them, so a kernel asks the
/// device, once, which takes milliseconds; where Traits::expects_pairs() says no, it is 0.
std::uint32_t row_pairs(const std::shared_ptr<Device>& device);

}  // namespace keyfold::vulkan

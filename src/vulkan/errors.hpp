// Vulkan's errors as keyfold's.
#pragma once

#include <memory>
#include <string>

#include "core/backend.hpp"
#include "vulkan/gpu.hpp"

namespace keyfold::vulkan {

/// body(device) while a run begins, or begins anew, on the device that is in use now. Where the
/// memory does not suffice nothing is lost yet; a lost device is given up.
template <class Body>
decltype(auto) guard_begin(Gpu& gpu, const Body& body) {
  std::shared_ptr<Device> device;
  try {
    device = gpu.device();
    return body(device);
  } catch (const vk::OutOfDeviceMemoryError&) {
    throw RunError(ErrorCode::kOutOfMemory, "the GPU has no memory left for this call's scratch");
  } catch (const vk::OutOfHostMemoryError&) {
    throw RunError(ErrorCode::kOutOfMemory, "the GPU's driver has no host memory left");
  } catch (const vk::DeviceLostError& e) {
    if (device) gpu.give_up(device);
    throw core::DeviceLost(std::string("Vulkan: ") + e.what());
  } catch (const vk::Error& e) {
    throw RunError(ErrorCode::kDeviceFailure, std::string("Vulkan: ") + e.what());
  }
}

/// body() while a run goes on. After a loss, or when memory runs out in the middle, the device is
/// given up: the next one is made anew.
template <class Body>
decltype(auto) guard_run(Gpu& gpu, const std::shared_ptr<Device>& device, const Body& body) {
  try {
    return body();
  } catch (const vk::DeviceLostError& e) {
    gpu.give_up(device);
    throw core::DeviceLost(std::string("Vulkan: ") + e.what());
  } catch (const vk::OutOfDeviceMemoryError& e) {
    gpu.give_up(device);
    throw core::DeviceLost(std::string("Vulkan: ") + e.what());
  } catch (const vk::Error& e) {
    throw RunError(ErrorCode::kDeviceFailure, std::string("Vulkan: ") + e.what());
  }
}

}  // namespace keyfold::vulkan

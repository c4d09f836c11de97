// The driver's errors as keyfold's.
#pragma once

#include "core/backend.hpp"
#include "cuda/gpu.hpp"

namespace keyfold::cuda {

/// body() with the device's context current.
template <class Body>
decltype(auto) guard_run(Gpu& gpu, Device& device, const Body& body) {
  try {
    const Scope scope(device.driver(), device.context());
    return body();
  } catch (const Failure& failure) {
    const std::string what = std::string("CUDA: ") + failure.what();
    if (failure.out_of_memory()) {
      throw RunError(ErrorCode::kOutOfMemory, "the GPU has no memory left for this call: " + what);
    }
    if (!failure.fatal()) throw RunError(ErrorCode::kDeviceFailure, what);
    gpu.fail(failure.what());
    throw core::DeviceLost(what);
  }
}

/// body(device) for the GPU's device, which is opened first.
template <class Body>
decltype(auto) guard_begin(Gpu& gpu, const Body& body) {
  std::shared_ptr<Device> device;
  try {
    device = gpu.device();
  } catch (const Failure& failure) {
    throw RunError(failure.out_of_memory() ? ErrorCode::kOutOfMemory : ErrorCode::kDeviceFailure,
                   std::string("CUDA: ") + failure.what());
  }
  return guard_run(gpu, *device, [&]() -> decltype(auto) { return body(device); });
}

}  // namespace keyfold::cuda

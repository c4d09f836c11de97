// Whether a GPU can be used, and opening it.
#include "cuda/gpu.hpp"

#include "core/backend.hpp"

namespace keyfold::cuda {
namespace {

constexpr int kOldestCapability = 75;  // that NVRTC 13 makes code for

CUdevice device_at(const Driver& driver, int ordinal) {
  CUdevice device = 0;
  driver.device_get(&device, ordinal);
  return device;
}

}  // namespace

Gpu::Gpu(const Driver& driver, int ordinal)
    : driver_(driver),
      handle_(device_at(driver, ordinal)),
      traits_(Traits::of(driver, handle_)),
      missing_(driver.missing()) {
  if (missing_.empty() && traits_.capability < kOldestCapability) {
    missing_ = "this GPU has compute capability " + std::to_string(traits_.capability / 10) + "." +
               std::to_string(traits_.capability % 10) + ", and keyfold needs 7.5 or newer";
  }
  if (!missing_.empty()) return;
  try {
    nvrtc_.emplace(driver.version());
    nvrtc_->target(traits_.capability);
  } catch (const RunError& error) {
    missing_ = error.what();
  }
}

std::shared_ptr<Device> Gpu::device() {
  const std::lock_guard lock(mutex_);
  if (!failed_.empty()) {
    throw core::DeviceLost("CUDA: " + failed_ +
                           ", earlier in this process; CUDA can't use the device again before the "
                           "process is started anew: do so, or name another backend");
  }
  if (!device_) device_ = std::make_shared<Device>(driver_, handle_, traits_, *nvrtc_);
  return device_;
}

void Gpu::fail(const std::string& what) {
  const std::lock_guard lock(mutex_);
  if (failed_.empty()) failed_ = what;
}

}  // namespace keyfold::cuda

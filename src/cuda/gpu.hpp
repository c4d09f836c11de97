// One GPU of the machine: what it is, whether it can be used, and what is in use of it.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "cuda/device.hpp"

namespace keyfold::cuda {

class Gpu {
 public:
  Gpu(const Driver& driver, int ordinal);

  const Driver& driver() const { return driver_; }
  const Traits& traits() const { return traits_; }
  /// Why no kernel can run on it; empty if one can.
  const std::string& missing() const { return missing_; }
  /// Opened at the first use. Throws DeviceLost after an error that the process can't outlive.
  std::shared_ptr<Device> device();
  /// Such an error has come.
  void fail(const std::string& what);

 private:
  const Driver& driver_;
  CUdevice handle_ = 0;
  Traits traits_;
  std::string missing_;
  std::optional<Nvrtc> nvrtc_;
  std::mutex mutex_;
  std::string failed_;
  std::shared_ptr<Device> device_;
};

}  // namespace keyfold::cuda

// Keys and values that stay on the device: what is behind a DeviceBuffer.
#pragma once

#include "core/backend.hpp"
#include "cuda/gpu.hpp"

namespace keyfold::cuda {

class CudaMemory : public core::DeviceMemory {
 public:
  CudaMemory(Gpu& gpu, std::int64_t bytes);

  void upload(std::int64_t offset, const void* from, std::int64_t bytes) override;
  void download(std::int64_t offset, void* to, std::int64_t bytes) const override;

  CUdeviceptr address() const { return buffer_->address; }

 private:
  Gpu& gpu_;
  std::shared_ptr<Device> device_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace keyfold::cuda

// A device in use: its context, memory, kernels and streams.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/buffer.hpp"
#include "cuda/modules.hpp"
#include "cuda/traits.hpp"
#include "gpu/layout.hpp"

namespace keyfold::cuda {

/// What a Stream works with: kept from run to run, as making it takes longer than a short call.
struct StreamParts {
  StreamParts(const Driver& driver, CUcontext context);
  ~StreamParts();
  StreamParts(const StreamParts&) = delete;
  StreamParts& operator=(const StreamParts&) = delete;

  struct Slot {
    CUevent copied = nullptr;  ///< what the submission needs from the host has arrived
    CUevent begin = nullptr, end = nullptr;
  };

  const Driver& driver;
  CUcontext context;
  CUstream kernels = nullptr, copies = nullptr;
  std::array<Slot, gpu::kFrames> slots;  ///< of submission i: i % kFrames
  std::uint64_t submitted = 0;

 private:
  void destroy() noexcept;
};

/// In the device's primary context, as the CUDA runtime has it, so that memory of both is the same.
class Device {
 public:
  Device(const Driver& driver, CUdevice device, const Traits& traits, const Nvrtc& nvrtc);

  const Driver& driver() const { return driver_; }
  CUcontext context() const { return context_; }
  BufferPool& buffers() { return buffers_; }
  Modules& modules() { return modules_; }
  std::unique_ptr<StreamParts> take_stream();
  /// All that was submitted with it is done.
  void put_back(std::unique_ptr<StreamParts> parts) noexcept;

 private:
  const Driver& driver_;
  CUcontext context_;  // kept until the process ends
  BufferPool buffers_;
  Modules modules_;
  std::mutex streams_mutex_;
  std::vector<std::unique_ptr<StreamParts>> idle_streams_;
};

/// A buffer on loan from its device's pool.
class BufferLease {
 public:
  BufferLease() = default;
  BufferLease(std::shared_ptr<Device> device, Use use, std::int64_t size)
      : device_(std::move(device)), buffer_(device_->buffers().take(use, size)) {}
  BufferLease(BufferLease&&) noexcept = default;
  BufferLease& operator=(BufferLease&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  ~BufferLease() {
    if (buffer_) device_->buffers().put_back(std::move(buffer_));
  }

  explicit operator bool() const { return buffer_ != nullptr; }
  const Buffer* operator->() const { return buffer_.get(); }

 private:
  std::shared_ptr<Device> device_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace keyfold::cuda

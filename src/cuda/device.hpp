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
  /// For memory that is taken and given back in the order of a stream. Throws Failure.
  CUmemoryPool stream_pool();
  Modules& modules() { return modules_; }
  std::unique_ptr<StreamParts> take_stream();
  /// All that was submitted with it is done.
  void put_back(std::unique_ptr<StreamParts> parts) noexcept {
    idle_streams_.put_back(std::move(parts));
  }

 private:
  const Driver& driver_;
  CUdevice handle_;
  CUcontext context_;  // kept until the process ends
  std::mutex mutex_;
  CUmemoryPool stream_pool_ = nullptr;  // likewise
  BufferPool buffers_;
  Modules modules_;
  gpu::Idle<StreamParts> idle_streams_;
};

/// A buffer on loan from its device's pool.
using BufferLease = gpu::Lease<Device, Buffer>;

}  // namespace keyfold::cuda

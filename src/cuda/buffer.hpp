// Memory of a device and pinned memory of the host, reused from call to call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cuda/driver.hpp"
#include "gpu/idle.hpp"

namespace keyfold::cuda {

enum class Use : std::uint8_t {
  kDevice,  ///< read and written by kernels
  kPinned,  ///< of the host, for copies that go on beside the host's work
};

/// Freed with the context current or not.
struct Buffer {
  Buffer(const Driver& driver, CUcontext context, Use use, std::int64_t size);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  const Driver& driver;
  CUcontext context;
  Use use;
  std::int64_t size;
  CUdeviceptr address = 0;    ///< kDevice
  std::byte* host = nullptr;  ///< kPinned
};

/// Buffers that nobody uses now are kept, up to a limit, as allocating takes longer than a short
/// call. Used by all threads.
class BufferPool {
 public:
  BufferPool(const Driver& driver, CUcontext context) : driver_(driver), context_(context) {}

  /// A buffer of at least `size` > 0 bytes. Throws Failure.
  std::unique_ptr<Buffer> take(Use use, std::int64_t size);
  void put_back(std::unique_ptr<Buffer> buffer) noexcept { idle_.put_back(std::move(buffer)); }
  /// A buffer that never comes from the pool nor goes there.
  std::unique_ptr<Buffer> allocate(Use use, std::int64_t size);

 private:
  const Driver& driver_;
  CUcontext context_;
  gpu::IdleBuffers<Buffer> idle_;
};

}  // namespace keyfold::cuda

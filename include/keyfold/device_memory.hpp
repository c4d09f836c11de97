// Memory on a device, for keys and values that many calls use.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "keyfold/error.hpp"

namespace keyfold {

/// Memory of a backend's device that the host can name but not touch: data() is an address to put
/// into a TensorView, alone or with an offset added, and reading or writing through it faults.
///
/// Keys and values (k and v, both or neither) may be in device memory, in one buffer or in two, of
/// one backend; that backend is then the default for the call. A view must lie inside its buffer.
/// All other tensors are in host memory. A call reads the buffers only while it runs; upload(),
/// or destroying a buffer, during a call that uses it is the caller's error. Results do not depend
/// on where the keys are.
///
/// A device that is lost takes its buffers along: calls that use them then fail with RunError
/// (device failure), and so do upload() and download(); make them anew.
class KEYFOLD_API DeviceBuffer {
 public:
  /// `bytes` > 0 on the device of a backend, as devices() lists it; what they hold is undefined.
  /// Throws InvalidArgument, or RunError: unsupported where the backend has no memory of its own
  /// (the CPU), out of memory.
  explicit DeviceBuffer(std::string_view backend, std::int64_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&&) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&&) noexcept;

  /// The buffer's address, aligned to a page; no other memory of the process overlaps it.
  void* data() const noexcept;
  std::int64_t size() const noexcept;

  /// Copies from host memory to `offset`, or back, and returns when that is done. Throws
  /// InvalidArgument outside of the buffer, RunError when the device fails.
  void upload(std::int64_t offset, const void* from, std::int64_t bytes);
  void download(std::int64_t offset, void* to, std::int64_t bytes) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace keyfold

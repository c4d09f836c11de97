// A stream of the caller's: work in its order, timed where that is allowed, and memory for that
// work.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "cuda/device.hpp"

namespace keyfold::cuda {

/// Memory that work queued on a stream may use until its destruction, which is one more thing that
/// is queued there. While the stream is being captured it belongs to the graph. Made with the
/// context current.
class StreamMemory {
 public:
  StreamMemory() = default;
  StreamMemory(Device& device, CUstream stream, std::int64_t bytes);
  ~StreamMemory();
  StreamMemory(StreamMemory&& other) noexcept { *this = std::move(other); }
  StreamMemory& operator=(StreamMemory&& other) noexcept;

  CUdeviceptr address() const { return address_; }

 private:
  Device* device_ = nullptr;
  CUstream stream_ = nullptr;
  CUdeviceptr address_ = 0;
};

/// The context is current wherever a function of this class is called.
class CallerStream {
 public:
  /// Throws InvalidArgument for a stream of another context, RunError where its capture has failed.
  CallerStream(std::shared_ptr<Device> device, void* stream);
  /// Waits for nothing.
  ~CallerStream();
  CallerStream(const CallerStream&) = delete;
  CallerStream& operator=(const CallerStream&) = delete;

  CUstream get() const { return stream_; }
  /// It is being captured: nothing runs, and nothing can be waited for or timed.
  bool capturing() const { return capturing_; }

  /// Submits the work that `record` enqueues. At most gpu::kFrames are neither waited for nor given
  /// up. Events around a short call take the device as long as a kernel of it: what wait() is never
  /// asked for is not `timed`.
  void submit(const std::function<void()>& record, bool timed);
  /// Waits for the oldest timed submission; returns the seconds that it took. Not while capturing.
  double wait();
  /// Waits for all that is queued, whatever has failed.
  void drain() const noexcept;

 private:
  std::shared_ptr<Device> device_;
  CUstream stream_;
  bool capturing_ = false;
  std::unique_ptr<StreamParts> parts_;  // for their events; none while capturing
  std::uint64_t first_ = 0, finished_ = 0;
};

}  // namespace keyfold::cuda

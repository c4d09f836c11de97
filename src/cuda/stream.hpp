// Submissions of one run, in order: each is timed by the device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "cuda/device.hpp"

namespace keyfold::cuda {

/// The context is current wherever a function of this class is called.
class Stream {
 public:
  /// At most gpu::kFrames submissions are in flight.
  explicit Stream(std::shared_ptr<Device> device);
  /// Waits for what is in flight.
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  /// Where copies may be enqueued that the next submission is to wait for.
  CUstream copies() const { return parts_->copies; }
  using Record = std::function<void(CUstream)>;
  /// Submits the work that `record` enqueues. It begins when that of `copy` is done, which may go
  /// on beside the submissions before; neither that nor waiting counts as its time.
  void submit(const Record& record, const Record& copy = {});
  /// Waits for the oldest submission; returns the seconds that it took on the device.
  double wait();

  /// Since the stream began.
  std::uint64_t submitted() const { return parts_->submitted - first_; }

 private:
  std::shared_ptr<Device> device_;
  std::unique_ptr<StreamParts> parts_;
  std::uint64_t first_, finished_;  // counted as the parts do
};

}  // namespace keyfold::cuda

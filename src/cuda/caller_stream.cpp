// Order, time and memory on a stream that is not ours.
#include "cuda/caller_stream.hpp"

#include <utility>

namespace keyfold::cuda {

StreamMemory::StreamMemory(Device& device, CUstream stream, std::int64_t bytes)
    : device_(&device), stream_(stream) {
  device.driver().mem_alloc_from_pool_async(&address_, static_cast<std::size_t>(bytes),
                                            device.stream_pool(), stream);
}

StreamMemory::~StreamMemory() {
  if (address_ == 0) return;
  const Driver& driver = device_->driver();
  if (driver.ctx_push_current.quietly(device_->context()) != CUDA_SUCCESS) return;
  driver.mem_free_async.quietly(address_, stream_);
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
}

StreamMemory& StreamMemory::operator=(StreamMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(stream_, other.stream_);
  std::swap(address_, other.address_);
  return *this;
}

CallerStream::CallerStream(std::shared_ptr<Device> device, void* stream)
    : device_(std::move(device)), stream_(static_cast<CUstream>(stream)) {
  const Driver& driver = device_->driver();
  CUcontext context = nullptr;
  driver.stream_get_ctx(stream_, &context);
  if (context != device_->context()) {
    throw InvalidArgument("stream",
                          "expected a stream of the primary context of the CUDA device where the "
                          "tensors are, got one of another context or device");
  }
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  driver.stream_is_capturing(stream_, &status);
  if (status == CU_STREAM_CAPTURE_STATUS_INVALIDATED) {
    throw RunError(ErrorCode::kDeviceFailure,
                   "CUDA: the capture of this stream has failed already; end it and begin anew");
  }
  capturing_ = status == CU_STREAM_CAPTURE_STATUS_ACTIVE;
  if (capturing_) return;
  parts_ = device_->take_stream();
  first_ = finished_ = parts_->submitted;
}

CallerStream::~CallerStream() {
  // Events that are still to come do no harm: those of the next submission take their place.
  if (parts_) device_->put_back(std::move(parts_));
}

void CallerStream::submit(const std::function<void()>& record, bool timed) {
  if (capturing_) return record();
  const Driver& driver = device_->driver();
  const StreamParts::Slot& slot = parts_->slots[parts_->submitted % parts_->slots.size()];
  if (timed) driver.event_record(slot.begin, stream_);
  record();
  if (timed) driver.event_record(slot.end, stream_);
  // Windows' drivers (WSL 2 has them too) collect work before they begin; a query makes them begin.
  driver.stream_query.quietly(stream_);
  if (timed) ++parts_->submitted;
}

double CallerStream::wait() {
  const Driver& driver = device_->driver();
  const StreamParts::Slot& slot = parts_->slots[finished_ % parts_->slots.size()];
  driver.event_synchronize(slot.end);
  ++finished_;
  float milliseconds = 0;
  driver.event_elapsed_time(&milliseconds, slot.begin, slot.end);
  return static_cast<double>(milliseconds) * 1e-3;
}

void CallerStream::drain() const noexcept {
  const Driver& driver = device_->driver();
  if (capturing_ || driver.ctx_push_current.quietly(device_->context()) != CUDA_SUCCESS) return;
  driver.stream_synchronize.quietly(stream_);
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
}

}  // namespace keyfold::cuda

// Enqueueing and timing.
#include "cuda/stream.hpp"

#include <utility>

namespace keyfold::cuda {

Stream::Stream(std::shared_ptr<Device> device)
    : device_(std::move(device)),
      parts_(device_->take_stream()),
      first_(parts_->submitted),
      finished_(first_) {}

Stream::~Stream() {
  const Driver& driver = device_->driver();
  if (driver.ctx_push_current.quietly(device_->context()) != CUDA_SUCCESS) return;
  const bool done = driver.stream_synchronize.quietly(parts_->copies) == CUDA_SUCCESS &&
                    driver.stream_synchronize.quietly(parts_->kernels) == CUDA_SUCCESS;
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
  if (done) device_->put_back(std::move(parts_));
}

void Stream::submit(const Record& record, const Record& copy) {
  const Driver& driver = device_->driver();
  const StreamParts::Slot& slot = parts_->slots[parts_->submitted % parts_->slots.size()];
  if (copy) {
    copy(parts_->copies);
    driver.event_record(slot.copied, parts_->copies);
    driver.stream_wait_event(parts_->kernels, slot.copied, 0u);
  }
  driver.event_record(slot.begin, parts_->kernels);
  record(parts_->kernels);
  driver.event_record(slot.end, parts_->kernels);
  // Windows' drivers (WSL 2 has them too) collect work before they begin; a query makes them begin.
  driver.stream_query.quietly(parts_->kernels);
  ++parts_->submitted;
}

double Stream::wait() {
  const Driver& driver = device_->driver();
  const StreamParts::Slot& slot = parts_->slots[finished_ % parts_->slots.size()];
  driver.event_synchronize(slot.end);
  ++finished_;
  float milliseconds = 0;
  driver.event_elapsed_time(&milliseconds, slot.begin, slot.end);
  return static_cast<double>(milliseconds) * 1e-3;
}

}  // namespace keyfold::cuda

// The tensors of a call on a CUDA device, for the tests of device memory.
#pragma once

#include <memory>

#include "support/case.hpp"

namespace keyfold::test {

/// Copies of host tensors on a CUDA device, with all that lies between their elements, and a stream
/// on which copies and calls follow each other without a wait between them.
class DeviceTensors {
 public:
  /// `backend` is "cuda" or "cuda:N".
  explicit DeviceTensors(const std::string& backend);
  ~DeviceTensors();
  DeviceTensors(const DeviceTensors&) = delete;
  DeviceTensors& operator=(const DeviceTensors&) = delete;

  void* stream() const;
  TensorView copy(const TensorView& from);
  MutableTensorView copy(const MutableTensorView& from);
  /// The call with all of its tensors on the device; the host's are read until finish().
  Call copy(const Call& call);
  /// Lengths on the device.
  const std::int32_t* copy(const std::vector<std::int32_t>& lengths);
  /// Copies a tensor's memory back once finish() is called.
  void fetch(const MutableTensorView& from, const MutableTensorView& to);
  /// Waits for all of it.
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Whether tests shall run with their tensors on the device: KEYFOLD_TEST_MEMORY=device. Not where
/// a tensor spans gigabytes.
bool on_device(const std::string& backend, const Call& call);

}  // namespace keyfold::test

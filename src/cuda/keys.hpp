// The keys and values of a chunk where a kernel can read them: copied from the host by way of
// pinned memory into one of two windows.
#pragma once

#include <array>
#include <memory>

#include "core/backend.hpp"
#include "cuda/device.hpp"
#include "gpu/layout.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

class Keys {
 public:
  Keys(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block);

  /// Fills in where the chunk's keys are: on the device already, or in a window, to which they are
  /// brought by `copies` unless the last chunk had the same. One chunk may be in flight.
  void place(const ChunkBox& box, const core::KeySource& source, CUstream copies,
             gpu::Params& params);

 private:
  struct Window {
    BufferLease upload, keys;
    ChunkBox box{0, 0, 0, 0, 0, 0};  // of what it holds
  };

  std::shared_ptr<Device> device_;
  const gpu::Layout& layout_;
  std::array<Window, gpu::kFrames> windows_;
  std::size_t current_ = 0;
};

}  // namespace keyfold::cuda

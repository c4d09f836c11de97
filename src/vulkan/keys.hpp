// The keys and values of a chunk where a kernel can read them: copied from the host into one of two
// windows.
#pragma once

#include <array>
#include <memory>

#include "core/backend.hpp"
#include "gpu/layout.hpp"
#include "vulkan/device.hpp"

namespace keyfold::vulkan {

class Keys {
 public:
  Keys(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block);

  /// Fills in where the chunk's keys are: on the device already, or in a window, to which they are
  /// copied first unless the last chunk had the same. One chunk may be in flight.
  void place(const ChunkBox& box, const core::KeySource& source, Params& params);
  /// Copies them on to the device, where that is another memory.
  void record(const vk::raii::CommandBuffer& commands) const;

 private:
  struct Window {
    BufferLease upload, keys;
    ChunkBox box{0, 0, 0, 0, 0, 0};  // of what it holds
    std::int64_t bytes = 0;
  };

  const gpu::Layout& layout_;
  std::shared_ptr<Device> device_;
  std::array<Window, gpu::kFrames> windows_;
  std::size_t current_ = 0;
  bool fresh_ = false;  // the current window was filled by the last place()
};

}  // namespace keyfold::vulkan

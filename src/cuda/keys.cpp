// Windows of host keys and values.
#include "cuda/keys.hpp"

#include <utility>

#include "cuda/memory.hpp"
#include "gpu/window.hpp"

namespace keyfold::cuda {

Keys::Keys(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block)
    : device_(std::move(device)), layout_(layout) {
  if (layout.problem.keys_on_device) return;
  const std::int64_t bytes =
      layout.window(block.group_end - block.group_begin, block.row_end - block.row_begin);
  // Before the first keys come: when memory does not suffice, a run can still begin with less.
  for (Window& window : windows_) {
    window.upload = {device_, Use::kPinned, bytes};
    window.keys = {device_, Use::kDevice, bytes};
  }
}

void Keys::place(const ChunkBox& box, const core::KeySource& source, CUstream copies,
                 gpu::Params& params) {
  if (source.on_device()) {
    const auto address = [&](const core::DevicePlace& place) {
      return static_cast<const CudaMemory*>(place.memory)->address() +
             static_cast<gpu::Address>(place.offset);
    };
    gpu::point_at_tensors(box, source, address(source.k_device), address(source.v_device), params);
    return;
  }
  if (!gpu::same_keys(windows_[current_].box, box)) {
    current_ = (current_ + 1) % windows_.size();
    Window& window = windows_[current_];
    window.box = {};  // until it is whole
    gpu::copy_keys(layout_, box, source, window.upload->host,
                   [&](std::int64_t offset, std::int64_t bytes) {
                     device_->driver().memcpy_htod_async(
                         window.keys->address + static_cast<gpu::Address>(offset),
                         static_cast<const void*>(window.upload->host + offset),
                         static_cast<std::size_t>(bytes), copies);
                   });
    window.box = box;
  }
  gpu::point_at_window(layout_, box, windows_[current_].keys->address, params);
}

}  // namespace keyfold::cuda

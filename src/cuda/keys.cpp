// Windows of host keys and values.
#include "cuda/keys.hpp"

#include <utility>

#include "cuda/memory.hpp"
#include "gpu/window.hpp"

namespace keyfold::cuda {

Keys::Keys(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block)
    : device_(std::move(device)), layout_(layout) {
  const std::int64_t bytes =
      layout.window(block.group_end - block.group_begin, block.row_end - block.row_begin);
  // Before the first keys come: when memory does not suffice, a run can still begin with less.
  for (Window& window : windows_) {
    window.upload = {device_, Use::kPinned, bytes};
    window.keys = {device_, Use::kDevice, bytes};
  }
}

void Keys::place(const ChunkBox& box, const core::KeySource& source, gpu::Params& params) {
  if (source.on_device()) {
    fresh_ = false;
    const auto address = [&](const core::DevicePlace& place) {
      return static_cast<const CudaMemory*>(place.memory)->address() +
             static_cast<gpu::Address>(place.offset);
    };
    gpu::point_at_tensors(box, source, address(source.k_device), address(source.v_device), params);
    return;
  }
  fresh_ = !gpu::same_keys(windows_[current_].box, box);
  if (fresh_) current_ = (current_ + 1) % windows_.size();
  Window& window = windows_[current_];
  if (fresh_) {
    window.box = {};  // until it is whole
    window.bytes = gpu::copy_keys(layout_, box, source, window.upload->host);
    window.box = box;
  }
  gpu::point_at_window(layout_, box, window.keys->address, params);
}

void Keys::copy(CUstream stream) const {
  const Window& window = windows_[current_];
  device_->driver().memcpy_htod_async(window.keys->address,
                                      static_cast<const void*>(window.upload->host),
                                      static_cast<std::size_t>(window.bytes), stream);
}

}  // namespace keyfold::cuda

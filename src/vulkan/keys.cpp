// Windows of host keys and values.
#include "vulkan/keys.hpp"

#include <utility>

#include "gpu/window.hpp"
#include "vulkan/memory.hpp"

namespace keyfold::vulkan {

Keys::Keys(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block)
    : layout_(layout), device_(std::move(device)) {
  if (layout.problem.keys_on_device) return;
  const std::int64_t groups = block.group_end - block.group_begin;
  const std::int64_t rows = block.row_end - block.row_begin;
  const std::int64_t bytes = layout.window(groups, rows);
  for (Window& w : windows_) {
    if (layout.shared_memory) {
      w.keys = {device_, Use::kShared, bytes};
    } else {
      w.upload = {device_, Use::kUpload, bytes};
      w.keys = {device_, Use::kKernels, bytes};
    }
  }
}

void Keys::place(const ChunkBox& box, const core::KeySource& source, Params& params) {
  if (source.on_device()) {
    fresh_ = false;
    const auto address = [&](const core::DevicePlace& place) {
      return static_cast<const VulkanMemory*>(place.memory)->address_on(device_) +
             static_cast<Address>(place.offset);
    };
    gpu::point_at_tensors(box, source, address(source.k_device), address(source.v_device), params);
    return;
  }
  fresh_ = !gpu::same_keys(windows_[current_].box, box);
  if (fresh_) current_ = (current_ + 1) % windows_.size();
  Window& window = windows_[current_];
  if (fresh_) {
    window.box = {};  // until it is whole
    window.bytes = gpu::copy_keys(layout_, box, source,
                                  layout_.shared_memory ? window.keys->host : window.upload->host);
    window.box = box;
  }
  gpu::point_at_window(layout_, box, window.keys->address, params);
}

void Keys::record(const vk::raii::CommandBuffer& commands) const {
  if (!fresh_ || layout_.shared_memory) return;
  const Window& window = windows_[current_];
  commands.copyBuffer(*window.upload->handle, *window.keys->handle,
                      vk::BufferCopy(0, 0, static_cast<vk::DeviceSize>(window.bytes)));
}

}  // namespace keyfold::vulkan

// Windows of host keys and values.
#include "vulkan/keys.hpp"

#include <string>
#include <utility>

#include "vulkan/gather.hpp"
#include "vulkan/memory.hpp"

namespace keyfold::vulkan {

Keys::Keys(std::shared_ptr<Device> device, const Layout& layout, const core::Block& block)
    : layout_(layout), device_(std::move(device)) {
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

bool Keys::holds(const Window& window, const ChunkBox& box) const {
  return window.box.key_begin == box.key_begin && window.box.key_end == box.key_end &&
         window.box.group_begin == box.group_begin && window.box.group_end == box.group_end;
}

void Keys::place_on_device(const ChunkBox& box, const core::KeySource& source, Params& params) {
  fresh_ = false;
  const auto strides = [&](const char* name, const TensorView& t, std::int64_t offset) {
    const std::int64_t size = size_of(t.dtype);
    Dims steps = t.strides;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      steps[axis] = t.sizes[axis] == 1 && axis < 3 ? 0 : t.strides[axis] * size;
    }
    const bool aligned = offset % 16 == 0 && steps[0] % 16 == 0 && steps[1] % 16 == 0 &&
                         steps[2] % 16 == 0 && t.sizes[3] * size % 16 == 0;
    if (aligned && (t.sizes[3] == 1 || t.strides[3] == 1)) return steps;
    throw RunError(ErrorCode::kUnsupported,
                   std::string(name) +
                       " in device memory: expected dense rows that begin at multiples of 16 bytes "
                       "and are whole multiples of 16 bytes long; pad head_dim and value_dim, or "
                       "pass host memory");
  };
  const auto address = [&](const core::DevicePlace& place) {
    return static_cast<const VulkanMemory*>(place.memory)->address_on(device_) +
           static_cast<Address>(place.offset);
  };
  const Dims k = strides("k", source.k, source.k_device.offset);
  const Dims v = strides("v", source.v, source.v_device.offset);
  const std::int64_t first = box.key_begin - source.first_key;
  params.k = address(source.k_device) + static_cast<Address>(first * k[2]);
  params.v = address(source.v_device) + static_cast<Address>(first * v[2]);
  params.k_batch = k[0];
  params.k_head = k[1];
  params.k_key = k[2];
  params.v_batch = v[0];
  params.v_head = v[1];
  params.v_key = v[2];
}

void Keys::place(const core::Problem& problem, const ChunkBox& box, const core::KeySource& source,
                 Params& params) {
  if (source.on_device()) return place_on_device(box, source, params);
  fresh_ = !holds(windows_[current_], box);
  if (fresh_) current_ = (current_ + 1) % windows_.size();
  Window& window = windows_[current_];

  const std::int64_t keys = box.key_end - box.key_begin, kv_heads = problem.shape.num_kv_heads;
  const std::int64_t groups = box.group_end - box.group_begin;
  const std::int64_t k_group = keys * layout_.k_pitch(), v_group = keys * layout_.v_pitch();
  const std::int64_t values = groups * k_group;  // where the values begin
  if (fresh_) {
    window.box = {};  // until it is whole
    window.bytes = values + groups * v_group;
    std::byte* const to = layout_.shared_memory ? window.keys->host : window.upload->host;
    for (std::int64_t i = 0; i < groups; ++i) {
      const std::int64_t batch = (box.group_begin + i) / kv_heads;
      const std::int64_t head = (box.group_begin + i) % kv_heads;
      const std::int64_t limit = problem.key_limit[static_cast<std::size_t>(batch)];
      const core::KeyRange rows{box.key_begin - source.first_key,
                                std::min(box.key_end, limit) - source.first_key};
      if (rows.size() == 0) continue;
      copy_rows(
          {&source.k, batch, head, rows, to + i * k_group, layout_.k_pitch(), layout_.k_pitch()});
      copy_rows({&source.v, batch, head, rows, to + values + i * v_group, layout_.v_pitch(),
                 layout_.v_pitch()});
    }
    window.box = box;
  }
  // Kernels count groups from 0.
  const Address address = window.keys->address;
  params.k = address - static_cast<Address>(box.group_begin * k_group);
  params.v = address + static_cast<Address>(values - box.group_begin * v_group);
  params.k_head = k_group;
  params.v_head = v_group;
  params.k_batch = kv_heads * k_group;
  params.v_batch = kv_heads * v_group;
  params.k_key = layout_.k_pitch();
  params.v_key = layout_.v_pitch();
}

void Keys::record(const vk::raii::CommandBuffer& commands) const {
  if (!fresh_ || layout_.shared_memory) return;
  const Window& window = windows_[current_];
  commands.copyBuffer(*window.upload->handle, *window.keys->handle,
                      vk::BufferCopy(0, 0, static_cast<vk::DeviceSize>(window.bytes)));
}

}  // namespace keyfold::vulkan

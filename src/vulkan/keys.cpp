// Windows of host keys and values.
#include "vulkan/keys.hpp"

#include "vulkan/gather.hpp"

namespace keyfold::vulkan {

Keys::Keys(std::shared_ptr<Device> device, const Layout& layout, const core::Block& block)
    : layout_(layout) {
  const std::int64_t groups = block.group_end - block.group_begin;
  const std::int64_t rows = block.row_end - block.row_begin;
  const std::int64_t bytes = layout.window(groups, rows);
  for (Window& w : windows_) {
    if (layout.shared_memory) {
      w.keys = {device, Use::kShared, bytes};
    } else {
      w.upload = {device, Use::kUpload, bytes};
      w.keys = {device, Use::kKernels, bytes};
    }
  }
}

bool Keys::holds(const Window& window, const ChunkBox& box) const {
  return window.box.key_begin == box.key_begin && window.box.key_end == box.key_end &&
         window.box.group_begin == box.group_begin && window.box.group_end == box.group_end;
}

void Keys::place(const core::Problem& problem, const ChunkBox& box, const core::KeySource& source,
                 Params& params) {
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
      copy_rows({&source.k, batch, head, rows, to + i * k_group, layout_.k_pitch(), layout_.k_pitch()});
      copy_rows({&source.v, batch, head, rows, to + values + i * v_group, layout_.v_pitch(), layout_.v_pitch()});
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

// Keys and values of a chunk.
#include "gpu/window.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "gpu/gather.hpp"

namespace keyfold::gpu {
namespace {

constexpr std::int64_t kCopyBytes = 4 << 20;  // that go to the device together

/// In bytes.
Dims byte_strides(const TensorView& t) {
  Dims steps = t.strides;
  for (std::size_t axis = 0; axis < 4; ++axis) {
    steps[axis] = t.sizes[axis] == 1 && axis < 3 ? 0 : t.strides[axis] * size_of(t.dtype);
  }
  return steps;
}

Dims strides_of(const char* name, const TensorView& t, std::int64_t offset) {
  if (in_words(t, static_cast<Address>(offset))) return byte_strides(t);
  throw RunError(ErrorCode::kUnsupported,
                 std::string(name) +
                     " in device memory: expected dense rows that begin at multiples of 16 bytes "
                     "and are whole multiples of 16 bytes long; pad head_dim and value_dim, or "
                     "pass host memory");
}

}  // namespace

bool in_words(const TensorView& t, Address at) {
  const Dims steps = byte_strides(t);
  return at % 16 == 0 && steps[0] % 16 == 0 && steps[1] % 16 == 0 && steps[2] % 16 == 0 &&
         t.sizes[3] * size_of(t.dtype) % 16 == 0 && (t.sizes[3] == 1 || t.strides[3] == 1);
}

bool same_keys(const ChunkBox& a, const ChunkBox& b) {
  return a.key_begin == b.key_begin && a.key_end == b.key_end && a.group_begin == b.group_begin &&
         a.group_end == b.group_end;
}

std::int64_t copy_keys(const Layout& layout, const ChunkBox& box, const core::KeySource& source,
                       std::byte* to, const WhenCopied& when_copied) {
  const core::Problem& problem = layout.problem;
  const std::int64_t kv_heads = problem.shape.num_kv_heads;
  std::vector<RowsCopy> piece;
  std::int64_t sent = 0, end = 0;
  const auto flush = [&] {
    copy_rows(piece);
    piece.clear();
    if (when_copied) when_copied(sent, end - sent);
    sent = end;
  };
  const auto add = [&](const TensorView& tensor, std::int64_t pitch) {
    const std::int64_t step = std::max<std::int64_t>(1, kCopyBytes / pitch);
    for (std::int64_t group = box.group_begin; group < box.group_end; ++group) {
      const std::int64_t batch = group / kv_heads;
      const std::int64_t limit = problem.key_limit[static_cast<std::size_t>(batch)];
      for (std::int64_t key = box.key_begin; key < box.key_end; key += step) {
        const std::int64_t key_end = std::min(box.key_end, key + step);
        const core::KeyRange rows{key - source.first_key,
                                  std::min(key_end, limit) - source.first_key};
        if (rows.size() > 0)
          piece.push_back({&tensor, batch, group % kv_heads, rows, to + end, pitch, pitch});
        end += (key_end - key) * pitch;
        if (end - sent >= kCopyBytes) flush();
      }
    }
  };
  add(source.k, layout.k_pitch());
  add(source.v, layout.v_pitch());
  if (end > sent) flush();
  return end;
}

void point_at_window(const Layout& layout, const ChunkBox& box, Address window, Params& params) {
  const std::int64_t keys = box.key_end - box.key_begin;
  const std::int64_t kv_heads = layout.problem.shape.num_kv_heads;
  const std::int64_t k_group = keys * layout.k_pitch(), v_group = keys * layout.v_pitch();
  const std::int64_t values = (box.group_end - box.group_begin) * k_group;
  // Kernels count groups from 0.
  params.k = window - static_cast<Address>(box.group_begin * k_group);
  params.v = window + static_cast<Address>(values - box.group_begin * v_group);
  params.k_head = k_group;
  params.v_head = v_group;
  params.k_batch = kv_heads * k_group;
  params.v_batch = kv_heads * v_group;
  params.k_key = layout.k_pitch();
  params.v_key = layout.v_pitch();
}

void point_at_tensors(const ChunkBox& box, const core::KeySource& source, Address k, Address v,
                      Params& params) {
  const Dims k_strides = strides_of("k", source.k, source.k_device.offset);
  const Dims v_strides = strides_of("v", source.v, source.v_device.offset);
  const std::int64_t first = box.key_begin - source.first_key;
  params.k = k + static_cast<Address>(first * k_strides[2]);
  params.v = v + static_cast<Address>(first * v_strides[2]);
  params.k_batch = k_strides[0];
  params.k_head = k_strides[1];
  params.k_key = k_strides[2];
  params.v_batch = v_strides[0];
  params.v_head = v_strides[1];
  params.v_key = v_strides[2];
}

}  // namespace keyfold::gpu

// Numbers of a chunk.
#include "gpu/chunk.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "core/half.hpp"
#include "gpu/gather.hpp"

namespace keyfold::gpu {
namespace {

constexpr std::int64_t kFar = std::int64_t{1} << 30;  // farther than any row or key of a chunk

std::int32_t near(std::int64_t position) {
  return static_cast<std::int32_t>(std::clamp(position, -kFar, kFar));
}

std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace

std::int64_t states_of(const Layout& layout, const core::Block& block) {
  return layout.states(block.group_end - block.group_begin, block.row_end - block.row_begin);
}

void write_queries(const Layout& layout, const core::Block& block, std::byte* to) {
  const core::Problem& problem = layout.problem;
  const std::int64_t heads = problem.group_size(), rows = block.row_end - block.row_begin;
  const std::int64_t kv_heads = problem.shape.num_kv_heads, pitch = layout.k_pitch();
  std::vector<RowsCopy> copies;
  for (std::int64_t group = block.group_begin; group < block.group_end; ++group) {
    for (std::int64_t head = 0; head < heads; ++head, to += pitch) {
      // The heads of a row stand beside each other.
      copies.push_back({&problem.q,
                        group / kv_heads,
                        group % kv_heads * heads + head,
                        {block.row_begin, block.row_end},
                        to,
                        pitch,
                        heads * pitch});
    }
    to += (rows - 1) * heads * pitch;
  }
  copy_rows(copies);
}

void write_empty(std::int64_t states, std::byte* to) {
  const float empty[2] = {-std::numeric_limits<float>::infinity(), 0};
  for (std::int64_t i = 0; i < states; ++i) std::memcpy(to + i * 8, empty, sizeof empty);
}

Batch batch_of(const Layout& layout, const core::Block& block, const ChunkBox& box,
               std::size_t entry) {
  const core::Problem& problem = layout.problem;
  const std::int64_t row = problem.q_offset[entry] + block.row_begin - box.key_begin;
  Batch batch{-static_cast<std::int32_t>(kFar), static_cast<std::int32_t>(kFar), 0};
  if (problem.window_left) batch.first = near(row - std::min(*problem.window_left, 4 * kFar));
  if (problem.window_right) {
    batch.last = near(row + std::min(*problem.window_right, 4 * kFar) + 1);
  }
  batch.limit = static_cast<std::int32_t>(std::clamp<std::int64_t>(
      problem.key_limit[entry] - box.key_begin, 0, box.key_end - box.key_begin));
  return batch;
}

bool batches_alike(const core::Problem& problem) {
  const auto same = [](const std::vector<std::int64_t>& all) {
    return std::ranges::all_of(all, [&](std::int64_t x) { return x == all.front(); });
  };
  return problem.device_kv_lens == nullptr && same(problem.q_offset) && same(problem.key_limit);
}

void write_batches(const Layout& layout, const core::Block& block, const ChunkBox& box,
                   std::byte* to) {
  for (std::size_t b = 0; b < layout.problem.q_offset.size(); ++b) {
    const Batch batch = batch_of(layout, block, box, b);
    std::memcpy(to + b * sizeof batch, &batch, sizeof batch);
  }
}

Params describe(const Layout& layout, const core::Block& block, const ChunkBox& box) {
  const core::Problem& problem = layout.problem;
  const std::int64_t heads = problem.group_size();
  Params p;
  p.scale = problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale;
  p.softcap = problem.softcap;
  p.heads = u32(heads);
  p.kv_heads = u32(problem.shape.num_kv_heads);
  p.block_group = u32(block.group_begin);
  p.block_indices = u32((block.row_end - block.row_begin) * heads);
  p.group = u32(box.group_begin);
  p.index_begin = u32((box.row_begin - block.row_begin) * heads);
  p.index_end = u32((box.row_end - block.row_begin) * heads);
  p.num_keys = u32(box.key_end - box.key_begin);
  p.num_splits = u32(ceil_div(box.key_end - box.key_begin, layout.split_len()));
  return p;
}

Params part_of(Params p, const Wave& wave) {
  p.group += u32(wave.group);
  p.index_begin += u32(wave.index);
  p.index_end = p.index_begin + u32(wave.num_indices);
  p.split = u32(wave.split);
  p.num_splits = u32(wave.num_splits);
  return p;
}

Work work_of(const Layout& layout, const core::Block& block, const ChunkBox& box,
             const Params& chunk, std::int64_t max_groups) {
  return {.groups = box.group_end - box.group_begin,
          .indices = chunk.index_end - chunk.index_begin,
          .splits = chunk.num_splits,
          .tile_rows = layout.tiling.tile_rows,
          .max_groups = max_groups,
          .partials = layout.partial_rows(block.row_end - block.row_begin) / layout.tiling.units,
          .prepared = layout.prepared_splits(block.group_end - block.group_begin,
                                             block.row_end - block.row_begin),
          .shared = layout.tiling.shared,
          .decode = layout.tiling.decode,
          .folds = layout.tiling.folds};
}

std::int64_t copy_mask(const Layout& layout, const core::Block& block, const ChunkBox& box,
                       std::byte* to, Params& p) {
  const core::Problem& problem = layout.problem;
  if (!problem.mask) return 0;
  const TensorView& mask = *problem.mask;
  const std::int64_t kv_heads = problem.shape.num_kv_heads, heads = problem.group_size();
  // A broadcast axis is kept once.
  const auto kept = [&](std::size_t axis, core::KeyRange range) {
    return mask.strides[axis] == 0 ? core::KeyRange{0, 1} : range;
  };
  const std::int64_t first = box.group_begin, last = box.group_end - 1;
  const bool one_batch = first / kv_heads == last / kv_heads;
  const core::KeyRange batches = kept(0, {first / kv_heads, last / kv_heads + 1});
  const core::KeyRange all_heads =
      kept(1, one_batch ? core::KeyRange{first % kv_heads * heads, (last % kv_heads + 1) * heads}
                        : core::KeyRange{0, problem.shape.num_heads});
  const core::KeyRange rows = kept(2, {box.row_begin, box.row_end});
  const core::KeyRange keys = kept(3, {box.key_begin, box.key_end});

  const std::int64_t size = size_of(mask.dtype), pitch = keys.size() * size;
  TensorView part = mask;
  part.data = core::element(mask, 0, 0, 0, keys.begin);
  part.sizes[3] = keys.size();
  const std::byte* const begin = to;
  std::vector<RowsCopy> copies;
  for (std::int64_t b = batches.begin; b < batches.end; ++b) {
    for (std::int64_t h = all_heads.begin; h < all_heads.end; ++h) {
      copies.push_back({&part, b, h, rows, to, pitch, pitch});
      to += rows.size() * pitch;
    }
  }
  copy_rows(copies);
  const auto step = [&](std::size_t axis, std::int64_t bytes) {
    return mask.strides[axis] == 0 ? 0 : bytes;
  };
  p.mask_key = step(3, size);
  p.mask_row = step(2, pitch);
  p.mask_head = step(1, rows.size() * pitch);
  p.mask_batch = step(0, all_heads.size() * rows.size() * pitch);
  p.mask = -static_cast<Address>(batches.begin * p.mask_batch + all_heads.begin * p.mask_head +
                                 (box.row_begin - block.row_begin) * p.mask_row);
  return to - begin;
}

}  // namespace keyfold::gpu

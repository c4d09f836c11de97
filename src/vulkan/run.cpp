// Chunks as submissions.
#include "vulkan/run.hpp"

#include <tbb/parallel_for.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "core/half.hpp"
#include "vulkan/errors.hpp"
#include "vulkan/finish.hpp"
#include "vulkan/gather.hpp"
#include "vulkan/waves.hpp"

namespace keyfold::vulkan {
namespace {

constexpr std::int64_t kFar = std::int64_t{1} << 30;  // farther than any row or key of a chunk

std::int32_t near(std::int64_t position) {
  return static_cast<std::int32_t>(std::clamp(position, -kFar, kFar));
}

std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }

Params part_of(Params p, const Wave& wave) {
  p.group += u32(wave.group);
  p.index_begin += u32(wave.index);
  p.index_end = p.index_begin + u32(wave.num_indices);
  p.split = u32(wave.split);
  p.num_splits = u32(wave.num_splits);
  return p;
}

vk::BufferCopy copy_of(std::int64_t bytes, std::int64_t from = 0, std::int64_t to = 0) {
  return {static_cast<vk::DeviceSize>(from), static_cast<vk::DeviceSize>(to),
          static_cast<vk::DeviceSize>(bytes)};
}

}  // namespace

VulkanRun::OnDevice::OnDevice(std::shared_ptr<Device> made, const Layout& layout,
                              const core::Block& block)
    : device(std::move(made)), keys(device, layout, block), stream(device) {
  const std::int64_t groups = block.group_end - block.group_begin;
  const std::int64_t rows = block.row_end - block.row_begin;
  const std::int64_t states = layout.states(groups, rows), partials = layout.partial_rows(rows);
  const Use written = layout.shared_memory ? Use::kShared : Use::kUpload;
  start = {device, written, layout.q(states) + layout.ml(states)};
  if (!layout.shared_memory) q = {device, Use::kKernels, layout.q(states)};
  state = {device, Use::kKernels, layout.state(states)};
  partial_o = {device, Use::kKernels, layout.o(partials)};
  partial_ml = {device, Use::kKernels, layout.ml(partials)};
  transfer = {device, Use::kReadback, 2 * layout.piece(states)};
  const std::int64_t mask_bytes = layout.mask(groups, rows);
  for (Frame& frame : frames) {
    if (mask_bytes == 0) continue;
    frame.mask_upload = {device, written, mask_bytes};
    if (!layout.shared_memory) frame.mask = {device, Use::kKernels, mask_bytes};
  }
}

VulkanRun::VulkanRun(Gpu& gpu, const core::Problem& problem, const core::Block& block,
                     int num_threads)
    : gpu_(gpu),
      problem_(problem),
      block_(block),
      layout_{problem, Shapes(problem, gpu.traits()), gpu.traits().shared_memory},
      arena_(num_threads) {
  guard_begin(gpu_, [&](const auto& device) { prepare(device); });
}

std::int64_t VulkanRun::states() const {
  return layout_.states(block_.group_end - block_.group_begin, block_.row_end - block_.row_begin);
}

void VulkanRun::prepare(const std::shared_ptr<Device>& device) {
  begun_ = false;
  on_.reset();  // first, so that its memory can be used again
  on_ = std::make_unique<OnDevice>(device, layout_, block_);
  arena_.execute([&] {
    write_queries(on_->start->host);
    write_empty(on_->start->host + layout_.q(states()));
  });
}

void VulkanRun::write_empty(std::byte* to) const {
  const float empty[2] = {-std::numeric_limits<float>::infinity(), 0};
  for (std::int64_t i = 0; i < states(); ++i) std::memcpy(to + i * 8, empty, sizeof empty);
}

void VulkanRun::begin_state(const Commands& commands) {
  if (std::exchange(begun_, true)) return;
  const std::int64_t q = layout_.q(states()), o = layout_.o(states());
  if (on_->q) commands.copyBuffer(*on_->start->handle, *on_->q->handle, copy_of(q));
  if (saved_) return;  // recover() has put it there
  commands.copyBuffer(*on_->start->handle, *on_->state->handle,
                      copy_of(layout_.ml(states()), q, o));
  commands.fillBuffer(*on_->state->handle, 0, static_cast<vk::DeviceSize>(o), 0);
}

void VulkanRun::begin_state() {
  if (begun_) return;
  on_->stream.submit([&](const Commands& commands) { begin_state(commands); });
  on_->stream.wait();
}

void VulkanRun::write_queries(std::byte* to) const {
  const std::int64_t heads = problem_.group_size(), rows = block_.row_end - block_.row_begin;
  const std::int64_t kv_heads = problem_.shape.num_kv_heads, pitch = layout_.k_pitch();
  for (std::int64_t group = block_.group_begin; group < block_.group_end; ++group) {
    for (std::int64_t head = 0; head < heads; ++head, to += pitch) {
      // The heads of a row stand beside each other.
      copy_rows({&problem_.q,
                 group / kv_heads,
                 group % kv_heads * heads + head,
                 {block_.row_begin, block_.row_end},
                 to,
                 pitch,
                 heads * pitch});
    }
    to += (rows - 1) * heads * pitch;
  }
}

void VulkanRun::write_batches(const ChunkBox& box, std::byte* to) const {
  for (std::size_t b = 0; b < problem_.q_offset.size(); ++b) {
    const std::int64_t row = problem_.q_offset[b] + block_.row_begin - box.key_begin;
    Batch batch{-static_cast<std::int32_t>(kFar), static_cast<std::int32_t>(kFar), 0};
    if (problem_.window_left) batch.first = near(row - std::min(*problem_.window_left, 4 * kFar));
    if (problem_.window_right) {
      batch.last = near(row + std::min(*problem_.window_right, 4 * kFar) + 1);
    }
    batch.limit = static_cast<std::int32_t>(std::clamp<std::int64_t>(
        problem_.key_limit[b] - box.key_begin, 0, box.key_end - box.key_begin));
    std::memcpy(to + b * sizeof batch, &batch, sizeof batch);
  }
}

Params VulkanRun::describe(const ChunkBox& box) const {
  const std::int64_t heads = problem_.group_size();
  Params p;
  p.q = (on_->q ? on_->q : on_->start)->address;
  p.o = on_->state->address;
  p.ml = p.o + static_cast<Address>(layout_.o(states()));
  p.partial_o = on_->partial_o->address;
  p.partial_ml = on_->partial_ml->address;
  p.scale = problem_.softcap > 0 ? problem_.scale / problem_.softcap : problem_.scale;
  p.softcap = problem_.softcap;
  p.heads = u32(heads);
  p.kv_heads = u32(problem_.shape.num_kv_heads);
  p.block_group = u32(block_.group_begin);
  p.block_indices = u32((block_.row_end - block_.row_begin) * heads);
  p.group = u32(box.group_begin);
  p.index_begin = u32((box.row_begin - block_.row_begin) * heads);
  p.index_end = u32((box.row_end - block_.row_begin) * heads);
  p.num_keys = u32(box.key_end - box.key_begin);
  p.num_splits = u32(ceil_div(box.key_end - box.key_begin, layout_.split_len()));
  return p;
}

std::function<void(const VulkanRun::Commands&)> VulkanRun::upload_mask(const ChunkBox& box,
                                                                       OnDevice::Frame& frame,
                                                                       Params& p) const {
  if (!problem_.mask) return [](const Commands&) {};
  const TensorView& mask = *problem_.mask;
  const std::int64_t kv_heads = problem_.shape.num_kv_heads, heads = problem_.group_size();
  // A broadcast axis is kept once.
  const auto kept = [&](std::size_t axis, core::KeyRange range) {
    return mask.strides[axis] == 0 ? core::KeyRange{0, 1} : range;
  };
  const std::int64_t first = box.group_begin, last = box.group_end - 1;
  const bool one_batch = first / kv_heads == last / kv_heads;
  const core::KeyRange batches = kept(0, {first / kv_heads, last / kv_heads + 1});
  const core::KeyRange all_heads =
      kept(1, one_batch ? core::KeyRange{first % kv_heads * heads, (last % kv_heads + 1) * heads}
                        : core::KeyRange{0, problem_.shape.num_heads});
  const core::KeyRange rows = kept(2, {box.row_begin, box.row_end});
  const core::KeyRange keys = kept(3, {box.key_begin, box.key_end});

  const std::int64_t size = size_of(mask.dtype), pitch = keys.size() * size;
  TensorView part = mask;
  part.data = core::element(mask, 0, 0, 0, keys.begin);
  part.sizes[3] = keys.size();
  std::byte* const begin = frame.mask_upload->host;
  std::byte* to = begin;
  for (std::int64_t b = batches.begin; b < batches.end; ++b) {
    for (std::int64_t h = all_heads.begin; h < all_heads.end; ++h) {
      copy_rows({&part, b, h, rows, to, pitch, pitch});
      to += rows.size() * pitch;
    }
  }
  const auto step = [&](std::size_t axis, std::int64_t bytes) {
    return mask.strides[axis] == 0 ? 0 : bytes;
  };
  p.mask_key = step(3, size);
  p.mask_row = step(2, pitch);
  p.mask_head = step(1, rows.size() * pitch);
  p.mask_batch = step(0, all_heads.size() * rows.size() * pitch);
  p.mask = (frame.mask ? frame.mask : frame.mask_upload)->address -
           static_cast<Address>(batches.begin * p.mask_batch + all_heads.begin * p.mask_head +
                                (box.row_begin - block_.row_begin) * p.mask_row);
  const std::int64_t bytes = to - begin;
  return [&frame, bytes](const Commands& commands) {
    if (!frame.mask) return;
    commands.copyBuffer(*frame.mask_upload->handle, *frame.mask->handle, copy_of(bytes));
  };
}

std::vector<VulkanRun::Dispatch> VulkanRun::plan_dispatches(const ChunkBox& box,
                                                            std::vector<Params>& params) const {
  const Shapes& shapes = layout_.shapes;
  const Params chunk = params.front();
  params.clear();
  const Waves cut = cut_chunk({.groups = box.group_end - box.group_begin,
                               .indices = chunk.index_end - chunk.index_begin,
                               .splits = chunk.num_splits,
                               .tile_rows = shapes.tile_rows(),
                               .max_groups = gpu_.traits().max_groups_z,
                               .partials = layout_.partial_rows(block_.row_end - block_.row_begin),
                               .decode = shapes.decode()});
  std::vector<Dispatch> result;
  const auto add = [&](Kernel kernel, const Wave& wave, std::int64_t rows, std::int64_t y) {
    result.push_back({on_->device->pipelines().get(kernel, shapes.constants(kernel, !cut.direct)),
                      u32(static_cast<std::int64_t>(params.size()) - 1),
                      u32(ceil_div(wave.num_indices, rows)), u32(y), u32(wave.num_groups)});
  };
  for (const Wave& wave : cut.waves) {
    params.push_back(part_of(chunk, wave));
    add(shapes.main(), wave, shapes.tile_rows(), cut.direct ? 1 : wave.num_splits);
    if (!cut.direct) add(Kernel::kMerge, wave, shapes.merge_rows(), 1);
  }
  return result;
}

void VulkanRun::write_head(OnDevice::Frame& frame, std::vector<Params>& params,
                           const ChunkBox& box) const {
  const auto params_bytes = static_cast<std::int64_t>(params.size() * sizeof(Params));
  const std::int64_t bytes =
      params_bytes + problem_.shape.batch * static_cast<std::int64_t>(sizeof(Batch));
  if (!frame.head || frame.head->size < bytes) {
    frame.head_upload = {on_->device, Use::kUpload, bytes};
    frame.head = {on_->device, Use::kKernels, bytes};
  }
  frame.head_bytes = bytes;
  for (Params& p : params) p.batches = frame.head->address + static_cast<Address>(params_bytes);
  std::memcpy(frame.head_upload->host, params.data(), static_cast<std::size_t>(params_bytes));
  write_batches(box, frame.head_upload->host + params_bytes);
}

void VulkanRun::run_dispatches(const Commands& commands, const OnDevice::Frame& frame,
                               const std::vector<Dispatch>& dispatches) const {
  const vk::PipelineLayout layout = on_->device->pipelines().layout();
  commands.copyBuffer(*frame.head_upload->handle, *frame.head->handle, copy_of(frame.head_bytes));
  for (const Dispatch& d : dispatches) {
    Stream::barrier(commands);
    commands.bindPipeline(vk::PipelineBindPoint::eCompute, d.pipeline);
    commands.pushConstants<Address>(layout, vk::ShaderStageFlagBits::eCompute, 0,
                                    frame.head->address + d.params * sizeof(Params));
    commands.dispatch(d.x, d.y, d.z);
  }
}

void VulkanRun::submit(const core::Chunk& chunk, const core::KeySource& source) {
  guard_run(gpu_, on_->device, [&] {
    OnDevice::Frame& frame = on_->frames[on_->stream.submitted() % kFrames];
    std::vector<Params> params{describe(chunk.box)};
    std::function<void(const Commands&)> upload;
    arena_.execute([&] {
      on_->keys.place(problem_, chunk.box, source, params.front());
      upload = upload_mask(chunk.box, frame, params.front());
    });
    const std::vector<Dispatch> dispatches = plan_dispatches(chunk.box, params);
    write_head(frame, params, chunk.box);
    on_->stream.submit([&](const Commands& commands) {
      begin_state(commands);
      on_->keys.record(commands);
      upload(commands);
      run_dispatches(commands, frame, dispatches);
    });
  });
}

double VulkanRun::wait() {
  return guard_run(gpu_, on_->device, [&] { return on_->stream.wait(); });
}

HostState VulkanRun::download() {
  begin_state();
  const std::int64_t bytes = layout_.state(states()), piece = layout_.piece(states());
  HostState saved{std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(bytes / 4)),
                  nullptr, layout_.padded_value_dim()};
  saved.ml = saved.o.get() + layout_.o(states()) / 4;
  // Two pieces in turn: one is on its way while the other is copied.
  const auto place = [&](std::int64_t at) { return at / piece % 2 * piece; };
  const auto fetch = [&](std::int64_t at) {
    on_->stream.submit([&](const Commands& commands) {
      commands.copyBuffer(*on_->state->handle, *on_->transfer->handle,
                          copy_of(std::min(piece, bytes - at), at, place(at)));
    });
  };
  fetch(0);
  for (std::int64_t at = 0; at < bytes; at += piece) {
    if (at + piece < bytes) fetch(at + piece);
    on_->stream.wait();
    const std::byte* const source = on_->transfer->host + place(at);
    std::byte* const to = reinterpret_cast<std::byte*>(saved.o.get()) + at;
    const std::int64_t size = std::min(piece, bytes - at);
    arena_.execute([&] {
      tbb::parallel_for(tbb::blocked_range<std::int64_t>(0, size, 64 << 10), [&](const auto& part) {
        std::memcpy(to + part.begin(), source + part.begin(),
                    static_cast<std::size_t>(part.size()));
      });
    });
  }
  return saved;
}

void VulkanRun::checkpoint() {
  guard_run(gpu_, on_->device, [&] { saved_ = download(); });
}

void VulkanRun::recover() {
  guard_begin(gpu_, [&](const auto& device) {
    prepare(device);
    if (!saved_) return;
    const std::int64_t bytes = layout_.state(states()), piece = layout_.piece(states());
    for (std::int64_t at = 0; at < bytes; at += piece) {
      const std::int64_t size = std::min(piece, bytes - at);
      std::memcpy(on_->transfer->host, reinterpret_cast<const std::byte*>(saved_->o.get()) + at,
                  static_cast<std::size_t>(size));
      on_->stream.submit([&](const Commands& commands) {
        commands.copyBuffer(*on_->transfer->handle, *on_->state->handle, copy_of(size, 0, at));
      });
      on_->stream.wait();
    }
  });
}

void VulkanRun::merge(core::Run& other) {
  auto& from = dynamic_cast<VulkanRun&>(other);
  for (VulkanRun* run : {this, &from}) {  // one of the two may stand on a device of before a loss
    if (run->on_->device == gpu_.device()) continue;
    run->checkpoint();
    run->recover();
  }
  guard_run(gpu_, on_->device, [&] {
    begin_state();
    from.begin_state();
    // The other's states are the partials of one split.
    const ChunkBox all{
        block_.group_begin, block_.group_end, block_.row_begin, block_.row_end, 0, 0};
    const Shapes& shapes = layout_.shapes;
    const vk::Pipeline pipeline =
        on_->device->pipelines().get(Kernel::kMerge, shapes.constants(Kernel::kMerge, true));
    const Params whole = describe(all);
    const Address other_o = from.on_->state->address;
    const Address other_ml = other_o + static_cast<Address>(layout_.o(states()));
    std::vector<Params> params;
    std::vector<Dispatch> dispatches;
    for (const Wave& wave : cut_merge({.groups = all.group_end - all.group_begin,
                            .indices = whole.index_end,
                            .splits = 1,
                            .tile_rows = shapes.merge_rows(),
                            .max_groups = gpu_.traits().max_groups_z})) {
      Params p = part_of(whole, wave);
      const std::int64_t first = wave.group * std::int64_t{whole.index_end} + wave.index;
      p.partial_o = other_o + static_cast<Address>(layout_.o(first));
      p.partial_ml = other_ml + static_cast<Address>(layout_.ml(first));
      dispatches.push_back({pipeline, u32(static_cast<std::int64_t>(params.size())),
                            u32(ceil_div(wave.num_indices, shapes.merge_rows())), 1,
                            u32(wave.num_groups)});
      params.push_back(p);
    }
    OnDevice::Frame& frame = on_->frames[on_->stream.submitted() % kFrames];
    write_head(frame, params, all);
    on_->stream.submit(
        [&](const Commands& commands) { run_dispatches(commands, frame, dispatches); });
    on_->stream.wait();
  });
}

void VulkanRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  guard_run(gpu_, on_->device, [&] {
    const HostState state = download();
    arena_.execute([&] { write_rows(problem_, block_, state, out, lse); });
  });
}

}  // namespace keyfold::vulkan

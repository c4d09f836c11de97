// Chunks as submissions.
#include "vulkan/run.hpp"

#include <tbb/parallel_for.h>

#include <cstring>
#include <utility>

#include "gpu/cast.hpp"
#include "gpu/chunk.hpp"
#include "gpu/finish.hpp"
#include "gpu/waves.hpp"
#include "vulkan/element_layout.hpp"
#include "vulkan/errors.hpp"

namespace keyfold::vulkan {
namespace {

using gpu::u32;

vk::BufferCopy copy_of(std::int64_t bytes, std::int64_t from = 0, std::int64_t to = 0) {
  return {static_cast<vk::DeviceSize>(from), static_cast<vk::DeviceSize>(to),
          static_cast<vk::DeviceSize>(bytes)};
}

}  // namespace

VulkanRun::OnDevice::OnDevice(std::shared_ptr<Device> made, const gpu::Layout& layout,
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
      shapes_(problem, gpu.traits()),
      layout_{problem, shapes_.tiling(), gpu.traits().shared_memory},
      arena_(num_threads) {
  guard_begin(gpu_, [&](const auto& device) { prepare(device); });
}

std::int64_t VulkanRun::states() const { return gpu::states_of(layout_, block_); }

void VulkanRun::prepare(const std::shared_ptr<Device>& device) {
  begun_ = false;
  on_.reset();  // first, so that its memory can be used again
  on_ = std::make_unique<OnDevice>(device, layout_, block_);
  arena_.execute([&] {
    gpu::write_queries(layout_, block_, on_->start->host);
    gpu::write_empty(states(), on_->start->host + layout_.q(states()));
  });
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

Params VulkanRun::describe(const ChunkBox& box) const {
  Params p = gpu::describe(layout_, block_, box);
  p.q = (on_->q ? on_->q : on_->start)->address;
  p.o = on_->state->address;
  p.ml = p.o + static_cast<Address>(layout_.o(states()));
  p.partial_o = on_->partial_o->address;
  p.partial_ml = on_->partial_ml->address;
  return p;
}

std::function<void(const VulkanRun::Commands&)> VulkanRun::upload_mask(const ChunkBox& box,
                                                                       OnDevice::Frame& frame,
                                                                       Params& p) const {
  if (!problem_.mask) return [](const Commands&) {};
  const std::int64_t bytes = gpu::copy_mask(layout_, block_, box, frame.mask_upload->host, p);
  p.mask += (frame.mask ? frame.mask : frame.mask_upload)->address;
  return [&frame, bytes](const Commands& commands) {
    if (!frame.mask) return;
    commands.copyBuffer(*frame.mask_upload->handle, *frame.mask->handle, copy_of(bytes));
  };
}

std::vector<VulkanRun::Dispatch> VulkanRun::plan_dispatches(const ChunkBox& box,
                                                            std::vector<Params>& params) const {
  const Params chunk = params.front();
  params.clear();
  const gpu::Waves cut =
      gpu::cut_chunk(gpu::work_of(layout_, block_, box, chunk, gpu_.traits().max_groups_z));
  std::vector<Dispatch> result;
  const std::uint32_t pairs = shapes_.matrices() ? row_pairs(on_->device) : 0;
  const auto add = [&](Kernel kernel, const gpu::Wave& wave, std::int64_t rows, std::int64_t y) {
    result.push_back(
        {on_->device->pipelines().get(kernel, shapes_.constants(kernel, !cut.direct, pairs)),
         u32(static_cast<std::int64_t>(params.size()) - 1),
         u32(gpu::ceil_div(wave.num_indices, rows)), u32(y), u32(wave.num_groups)});
  };
  for (const gpu::Wave& wave : cut.waves) {
    params.push_back(gpu::part_of(chunk, wave));
    add(shapes_.main(), wave, shapes_.tile_rows(), cut.direct ? 1 : wave.num_splits);
    if (!cut.direct) add(Kernel::kMerge, wave, shapes_.merge_rows(), 1);
  }
  return result;
}

void VulkanRun::write_head(OnDevice::Frame& frame, std::vector<Params>& params,
                           const ChunkBox& box) const {
  const auto params_bytes = static_cast<std::int64_t>(params.size() * sizeof(Params));
  const std::int64_t bytes =
      params_bytes + problem_.shape.batch * static_cast<std::int64_t>(sizeof(gpu::Batch));
  if (!frame.head || frame.head->size < bytes) {
    frame.head_upload = {on_->device, Use::kUpload, bytes};
    frame.head = {on_->device, Use::kKernels, bytes};
  }
  frame.head_bytes = bytes;
  for (Params& p : params) p.batches = frame.head->address + static_cast<Address>(params_bytes);
  std::memcpy(frame.head_upload->host, params.data(), static_cast<std::size_t>(params_bytes));
  gpu::write_batches(layout_, block_, box, frame.head_upload->host + params_bytes);
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
    OnDevice::Frame& frame = on_->frames[on_->stream.submitted() % gpu::kFrames];
    std::vector<Params> params{describe(chunk.box)};
    std::function<void(const Commands&)> upload;
    arena_.execute([&] {
      on_->keys.place(chunk.box, source, params.front());
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

gpu::HostState VulkanRun::download() {
  begin_state();
  const std::int64_t bytes = layout_.state(states()), piece = layout_.piece(states());
  gpu::HostState saved{std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(bytes / 4)),
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

void VulkanRun::restore() {
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
}

void VulkanRun::recover() {
  guard_begin(gpu_, [&](const auto& device) {
    prepare(device);
    if (saved_) restore();
  });
}

void VulkanRun::save(const StateView& to) {
  guard_run(gpu_, on_->device, [&] {
    const gpu::HostState state = download();
    arena_.execute([&] { gpu::save_rows(problem_, block_, state, to); });
  });
}

void VulkanRun::load(const StateView& from) {
  guard_run(gpu_, on_->device, [&] {
    arena_.execute(
        [&] { saved_ = gpu::load_rows(problem_, block_, from, layout_.padded_value_dim()); });
    begin_state();
    restore();
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
    const vk::Pipeline pipeline =
        on_->device->pipelines().get(Kernel::kMerge, shapes_.constants(Kernel::kMerge, true));
    const Params whole = describe(all);
    const Address other_o = from.on_->state->address;
    const Address other_ml = other_o + static_cast<Address>(layout_.o(states()));
    std::vector<Params> params;
    std::vector<Dispatch> dispatches;
    for (const gpu::Wave& wave : gpu::cut_merge({.groups = all.group_end - all.group_begin,
                                 .indices = whole.index_end,
                                 .splits = 1,
                                 .tile_rows = shapes_.merge_rows(),
                                 .max_groups = gpu_.traits().max_groups_z})) {
      Params p = gpu::part_of(whole, wave);
      const std::int64_t first = wave.group * std::int64_t{whole.index_end} + wave.index;
      p.partial_o = other_o + static_cast<Address>(layout_.o(first));
      p.partial_ml = other_ml + static_cast<Address>(layout_.ml(first));
      dispatches.push_back({pipeline, u32(static_cast<std::int64_t>(params.size())),
                            u32(gpu::ceil_div(wave.num_indices, shapes_.merge_rows())), 1,
                            u32(wave.num_groups)});
      params.push_back(p);
    }
    OnDevice::Frame& frame = on_->frames[on_->stream.submitted() % gpu::kFrames];
    write_head(frame, params, all);
    on_->stream.submit(
        [&](const Commands& commands) { run_dispatches(commands, frame, dispatches); });
    on_->stream.wait();
  });
}

void VulkanRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  guard_run(gpu_, on_->device, [&] {
    const gpu::HostState state = download();
    arena_.execute([&] { gpu::write_rows(problem_, block_, state, out, lse); });
  });
}

}  // namespace keyfold::vulkan

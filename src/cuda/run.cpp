// Chunks as submissions.
#include "cuda/run.hpp"

#include <tbb/parallel_for.h>

#include <cstring>
#include <utility>

#include "cuda/errors.hpp"
#include "gpu/waves.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::int64_t kMaxGridZ = 65535;

std::size_t usize(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

}  // namespace

CudaRun::OnDevice::OnDevice(std::shared_ptr<Device> made, const gpu::Layout& layout,
                            const core::Block& block)
    : device(std::move(made)), keys(device, layout, block), stream(device) {
  const std::int64_t groups = block.group_end - block.group_begin;
  const std::int64_t rows = block.row_end - block.row_begin;
  const std::int64_t states = layout.states(groups, rows), partials = layout.partial_rows(rows);
  start = {device, Use::kPinned, layout.q(states) + layout.ml(states)};
  q = {device, Use::kDevice, layout.q(states)};
  state = {device, Use::kDevice, layout.state(states)};
  if (partials > 0) {
    partial_o = {device, Use::kDevice, layout.o(partials)};
    partial_ml = {device, Use::kDevice, layout.ml(partials)};
  }
  if (const std::int64_t bytes = layout.flags(groups, rows)) flags = {device, Use::kDevice, bytes};
  transfer = {device, Use::kPinned, 2 * layout.piece(states)};
  const std::int64_t batch_bytes =
      layout.problem.shape.batch * static_cast<std::int64_t>(sizeof(gpu::Batch));
  const std::int64_t mask_bytes = layout.mask(groups, rows);
  for (Frame& frame : frames) {
    frame.batches_upload = {device, Use::kPinned, batch_bytes};
    frame.batches = {device, Use::kDevice, batch_bytes};
    if (mask_bytes == 0) continue;
    frame.mask_upload = {device, Use::kPinned, mask_bytes};
    frame.mask = {device, Use::kDevice, mask_bytes};
  }
}

template <class Body>
decltype(auto) CudaRun::guarded(const Body& body) {
  return guard_run(gpu_, *on_->device, body);
}

CudaRun::CudaRun(Gpu& gpu, const core::Problem& problem, const core::Block& block, int num_threads)
    : gpu_(gpu),
      problem_(problem),
      block_(block),
      shapes_(problem, gpu.traits()),
      layout_{problem, shapes_.tiling(), false},
      arena_(num_threads) {
  guard_begin(gpu_, [&](const std::shared_ptr<Device>& device) {
    on_ = std::make_unique<OnDevice>(device, layout_, block_);
    arena_.execute([&] {
      gpu::write_queries(layout_, block_, on_->start->host);
      gpu::write_empty(states(), on_->start->host + layout_.q(states()));
    });
    begin_state();
  });
}

void CudaRun::begin_state() {
  const Driver& driver = on_->device->driver();
  const std::int64_t q = layout_.q(states()), o = layout_.o(states()), ml = layout_.ml(states());
  on_->stream.submit([&](CUstream stream) {
    driver.memcpy_htod_async(on_->q->address, static_cast<const void*>(on_->start->host), usize(q),
                             stream);
    driver.memset_d8_async(on_->state->address, static_cast<unsigned char>(0), usize(o), stream);
    driver.memcpy_htod_async(on_->state->address + usize(o),
                             static_cast<const void*>(on_->start->host + q), usize(ml), stream);
  });
  on_->stream.wait();
}

gpu::Params CudaRun::describe(const ChunkBox& box, const OnDevice::Frame& frame) const {
  gpu::Params p = gpu::describe(layout_, block_, box);
  p.q = on_->q->address;
  p.o = on_->state->address;
  p.ml = p.o + static_cast<gpu::Address>(layout_.o(states()));
  if (on_->partial_o) {
    p.partial_o = on_->partial_o->address;
    p.partial_ml = on_->partial_ml->address;
  }
  p.batches = frame.batches->address;
  return p;
}

CudaRun::Launch CudaRun::launch_of(const KernelSpec& spec, Grid grid, const gpu::Wave& wave,
                                   const gpu::Params& params) const {
  Launch launch{on_->device->modules().get(spec), grid, spec.threads, spec.shared_bytes, params};
  if (spec.tiles) {
    launch.maps = encode_tensor_maps(on_->device->driver(), problem_, *spec.tiles,
                                     block_.group_end - block_.group_begin, params);
  }
  if (spec.jobs) {
    launch.jobs = {
        on_->flags ? on_->flags->address : 0, static_cast<std::uint32_t>(wave.num_groups),
        static_cast<std::uint32_t>(gpu::ceil_div(wave.num_indices, layout_.tiling.tile_rows))};
  }
  return launch;
}

std::vector<CudaRun::Launch> CudaRun::plan_launches(const ChunkBox& box,
                                                    const gpu::Params& chunk) const {
  const gpu::Waves cut = gpu::cut_chunk(gpu::work_of(layout_, block_, box, chunk, kMaxGridZ));
  const bool partial = !cut.direct;
  const KernelSpec main = shapes_.main(partial);
  const std::optional<KernelSpec> careful = shapes_.careful();
  std::vector<Launch> launches;
  for (const gpu::Wave& wave : cut.waves) {
    const gpu::Params params = gpu::part_of(chunk, wave);
    const Grid grid = shapes_.main_grid(wave, partial);
    launches.push_back(launch_of(main, grid, wave, params));
    if (careful) launches.push_back(launch_of(*careful, grid, wave, params));
    if (partial) launches.push_back(
          launch_of(shapes_.fold_partials(wave), shapes_.fold_grid(wave), wave, params));
  }
  return launches;
}

void CudaRun::run_launches(CUstream stream, const std::vector<Launch>& launches) const {
  for (const Launch& launch : launches) {
    // The driver only reads them.
    std::array<void*, 5> arguments{const_cast<gpu::Params*>(&launch.params)};
    std::size_t count = 1;
    if (launch.maps) {
      for (const CUtensorMap& map : *launch.maps)
        arguments[count++] = const_cast<CUtensorMap*>(&map);
    }
    if (launch.jobs) arguments[count++] = const_cast<Jobs*>(&*launch.jobs);
    on_->device->driver().launch_kernel(launch.function, launch.grid.x, launch.grid.y,
                                        launch.grid.z, launch.threads, 1u, 1u, launch.shared_bytes,
                                        stream, arguments.data(), nullptr);
  }
}

void CudaRun::submit(const core::Chunk& chunk, const core::KeySource& source) {
  guarded([&] {
    const Driver& driver = on_->device->driver();
    const OnDevice::Frame& frame = next_frame();
    gpu::Params params = describe(chunk.box, frame);
    std::int64_t mask_bytes = 0;
    arena_.execute([&] {
      on_->keys.place(chunk.box, source, params);
      if (!problem_.mask) return;
      mask_bytes = gpu::copy_mask(layout_, block_, chunk.box, frame.mask_upload->host, params);
      params.mask += frame.mask->address;
    });
    gpu::write_batches(layout_, block_, chunk.box, frame.batches_upload->host);
    const std::vector<Launch> launches = plan_launches(chunk.box, params);
    on_->stream.submit(
        [&](CUstream stream) { run_launches(stream, launches); },
        [&](CUstream stream) {
          driver.memcpy_htod_async(frame.batches->address,
                                   static_cast<const void*>(frame.batches_upload->host),
                                   usize(problem_.shape.batch) * sizeof(gpu::Batch), stream);
          if (mask_bytes > 0) {
            driver.memcpy_htod_async(frame.mask->address,
                                     static_cast<const void*>(frame.mask_upload->host),
                                     usize(mask_bytes), stream);
          }
          if (on_->keys.fresh()) on_->keys.copy(stream);
        });
  });
}

double CudaRun::wait() {
  return guarded([&] { return on_->stream.wait(); });
}

gpu::HostState CudaRun::download() {
  const Driver& driver = on_->device->driver();
  const std::int64_t bytes = layout_.state(states()), piece = layout_.piece(states());
  gpu::HostState saved{std::make_unique_for_overwrite<float[]>(usize(bytes / 4)), nullptr,
                       layout_.padded_value_dim()};
  saved.ml = saved.o.get() + layout_.o(states()) / 4;
  // Two pieces in turn: one is on its way while the other is copied.
  const auto place = [&](std::int64_t at) { return on_->transfer->host + at / piece % 2 * piece; };
  const auto fetch = [&](std::int64_t at) {
    on_->stream.submit([&](CUstream stream) {
      driver.memcpy_dtoh_async(static_cast<void*>(place(at)), on_->state->address + usize(at),
                               usize(std::min(piece, bytes - at)), stream);
    });
  };
  fetch(0);
  for (std::int64_t at = 0; at < bytes; at += piece) {
    if (at + piece < bytes) fetch(at + piece);
    on_->stream.wait();
    const std::byte* const source = place(at);
    std::byte* const to = reinterpret_cast<std::byte*>(saved.o.get()) + at;
    const std::int64_t size = std::min(piece, bytes - at);
    arena_.execute([&] {
      tbb::parallel_for(tbb::blocked_range<std::int64_t>(0, size, 64 << 10), [&](const auto& part) {
        std::memcpy(to + part.begin(), source + part.begin(), part.size());
      });
    });
  }
  return saved;
}

void CudaRun::merge(core::Run& other) {
  const auto& from = dynamic_cast<const CudaRun&>(other);
  guarded([&] {
    // The other's states are the partials of one split.
    const ChunkBox all{
        block_.group_begin, block_.group_end, block_.row_begin, block_.row_end, 0, 0};
    const gpu::Params whole = describe(all, next_frame());
    const gpu::Address other_o = from.on_->state->address;
    const gpu::Address other_ml = other_o + static_cast<gpu::Address>(layout_.o(states()));
    const KernelSpec merge = shapes_.merge();
    std::vector<Launch> launches;
    for (const gpu::Wave& wave : gpu::cut_merge({.groups = all.group_end - all.group_begin,
                                 .indices = whole.index_end,
                                 .splits = 1,
                                 .tile_rows = shapes_.merge_rows(),
                                 .max_groups = kMaxGridZ})) {
      gpu::Params p = gpu::part_of(whole, wave);
      const std::int64_t first = wave.group * std::int64_t{whole.index_end} + wave.index;
      p.partial_o = other_o + static_cast<gpu::Address>(layout_.o(first));
      p.partial_ml = other_ml + static_cast<gpu::Address>(layout_.ml(first));
      launches.push_back(launch_of(merge, shapes_.merge_grid(wave), wave, p));
    }
    on_->stream.submit([&](CUstream stream) { run_launches(stream, launches); });
    on_->stream.wait();
  });
}

void CudaRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  guarded([&] {
    const gpu::HostState state = download();
    arena_.execute([&] { gpu::write_rows(problem_, block_, state, out, lse); });
  });
}

}  // namespace keyfold::cuda

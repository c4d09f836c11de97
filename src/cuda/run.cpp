// Chunks as submissions.
#include "cuda/run.hpp"

#include <tbb/parallel_for.h>

#include <cstring>
#include <utility>

#include "cuda/errors.hpp"
#include "cuda/tensors.hpp"
#include "gpu/cast.hpp"
#include "gpu/waves.hpp"

namespace keyfold::cuda {
namespace {

using gpu::usize;

}  // namespace

CudaRun::OnDevice::OnDevice(std::shared_ptr<Device> made, const gpu::Layout& layout,
                            const core::Block& block)
    : device(std::move(made)), keys(device, layout, block), stream(device) {
  const std::int64_t groups = block.group_end - block.group_begin;
  const std::int64_t rows = block.row_end - block.row_begin;
  const std::int64_t states = layout.states(groups, rows), partials = layout.partial_rows(rows);
  const auto sinks_bytes = static_cast<std::int64_t>(layout.problem.sinks.size() * sizeof(float));
  start = {device, Use::kPinned, layout.q(states) + layout.ml(states) + sinks_bytes};
  if (sinks_bytes > 0) sinks = {device, Use::kDevice, sinks_bytes};
  q = {device, Use::kDevice, layout.q(states)};
  state = {device, Use::kDevice, layout.state(states)};
  if (partials > 0) {
    partial_o = {device, Use::kDevice, layout.o(partials)};
    partial_ml = {device, Use::kDevice, layout.ml(partials)};
  }
  if (const std::int64_t bytes = layout.flags(groups, rows)) flags = {device, Use::kDevice, bytes};
  if (const std::int64_t bytes = layout.prepared(groups, rows)) {
    prepared = {device, Use::kDevice, bytes};
  }
  if (const std::int64_t bytes = layout.cuts(groups, rows)) cuts = {device, Use::kDevice, bytes};
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

RunMemory CudaRun::OnDevice::memory() const {
  RunMemory memory{.q = q->address, .state = state->address};
  if (partial_o) {
    memory.partial_o = partial_o->address;
    memory.partial_ml = partial_ml->address;
  }
  if (flags) memory.flags = flags->address;
  if (prepared) memory.prepared = prepared->address;
  if (cuts) memory.cuts = cuts->address;
  return memory;
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
    launcher_.emplace(*on_->device, block_, shapes_, layout_, on_->memory());
    begin_state();
  });
}

void CudaRun::begin_state() {
  const Driver& driver = on_->device->driver();
  const std::int64_t q = layout_.q(states()), o = layout_.o(states()), ml = layout_.ml(states());
  const std::size_t sinks = problem_.sinks.size() * sizeof(float);
  if (sinks > 0) std::memcpy(on_->start->host + q + ml, problem_.sinks.data(), sinks);
  on_->stream.submit([&](CUstream stream) {
    driver.memcpy_htod_async(on_->q->address, static_cast<const void*>(on_->start->host), usize(q),
                             stream);
    driver.memset_d8_async(on_->state->address, static_cast<unsigned char>(0), usize(o), stream);
    if (on_->cuts) {
      driver.memset_d8_async(on_->cuts->address, static_cast<unsigned char>(0),
                             usize(shapes_.cut_flag_bytes()), stream);
    }
    driver.memcpy_htod_async(on_->state->address + usize(o),
                             static_cast<const void*>(on_->start->host + q), usize(ml), stream);
    if (sinks > 0) {
      driver.memcpy_htod_async(on_->sinks->address,
                               static_cast<const void*>(on_->start->host + q + ml), sinks, stream);
    }
  });
  on_->stream.wait();
}

void CudaRun::submit(const core::Chunk& chunk, const core::KeySource& source) {
  guarded([&] {
    const Driver& driver = on_->device->driver();
    const OnDevice::Frame& frame = next_frame();
    gpu::Params params = launcher_->describe(chunk.box, frame.batches->address);
    std::int64_t mask_bytes = 0;
    arena_.execute([&] {
      on_->keys.place(chunk.box, source, on_->stream.copies(), params);
      if (!problem_.mask) return;
      mask_bytes = gpu::copy_mask(layout_, block_, chunk.box, frame.mask_upload->host, params);
      params.mask += frame.mask->address;
    });
    gpu::write_batches(layout_, block_, chunk.box, frame.batches_upload->host);
    const std::vector<Launch> launches = launcher_->plan(chunk.box, params);
    on_->stream.submit(
        [&](CUstream stream) { launcher_->run(stream, launches); },
        [&](CUstream stream) {
          driver.memcpy_htod_async(frame.batches->address,
                                   static_cast<const void*>(frame.batches_upload->host),
                                   usize(problem_.shape.batch) * sizeof(gpu::Batch), stream);
          if (mask_bytes > 0) {
            driver.memcpy_htod_async(frame.mask->address,
                                     static_cast<const void*>(frame.mask_upload->host),
                                     usize(mask_bytes), stream);
          }
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

void CudaRun::save(const StateView& to) {
  guarded([&] {
    const gpu::HostState state = download();
    arena_.execute([&] { gpu::save_rows(problem_, block_, state, to); });
  });
}

void CudaRun::load(const StateView& from) {
  guarded([&] {
    const Driver& driver = on_->device->driver();
    gpu::HostState state;
    arena_.execute(
        [&] { state = gpu::load_rows(problem_, block_, from, layout_.padded_value_dim()); });
    const std::int64_t bytes = layout_.state(states()), piece = layout_.piece(states());
    for (std::int64_t at = 0; at < bytes; at += piece) {
      const std::size_t size = usize(std::min(piece, bytes - at));
      std::memcpy(on_->transfer->host, reinterpret_cast<const std::byte*>(state.o.get()) + at,
                  size);
      on_->stream.submit([&](CUstream stream) {
        driver.memcpy_htod_async(on_->state->address + usize(at),
                                 static_cast<const void*>(on_->transfer->host), size, stream);
      });
      on_->stream.wait();
    }
  });
}

void CudaRun::merge(core::Run& other) {
  const auto& from = dynamic_cast<const CudaRun&>(other);
  guarded([&] {
    const ChunkBox all{
        block_.group_begin, block_.group_end, block_.row_begin, block_.row_end, 0, 0};
    const gpu::Params whole = launcher_->describe(all, next_frame().batches->address);
    const std::vector<Launch> launches = launcher_->plan_merge(from.on_->state->address, whole);
    on_->stream.submit([&](CUstream stream) { launcher_->run(stream, launches); });
    on_->stream.wait();
  });
}

void CudaRun::finish_state() {
  // As for tensors on the device, so that results have the same bits; but where the state is.
  const std::int64_t heads = problem_.group_size(), width = layout_.padded_value_dim();
  const std::int64_t indices = (block_.row_end - block_.row_begin) * heads;
  const std::int64_t kv_heads = problem_.shape.num_kv_heads;
  const gpu::Address o = on_->state->address;
  const gpu::Address ml = o + static_cast<gpu::Address>(layout_.o(states()));
  const auto rows = [&](gpu::Address at, std::int64_t pitch) {
    return TensorRows{.at = at - static_cast<gpu::Address>(block_.group_begin * indices * pitch),
                      .batch = kv_heads * indices * pitch,
                      .group = indices * pitch,
                      .head = pitch,
                      .row = heads * pitch,
                      .column = 4};
  };
  const Finish what{.place = place_of(problem_, block_),
                    .o = o,
                    .ml = ml,
                    .ends = {.q = {},
                             .out = rows(o, 4 * width),
                             .lse = rows(ml, 8),
                             .sinks = on_->sinks ? on_->sinks->address : 0,
                             .sink_step = 4,
                             .value_dim = gpu::u32(problem_.shape.value_dim)},
                    .padded_value_dim = width};
  const TensorKernels tensors(*on_->device, problem_);
  on_->stream.submit([&](CUstream stream) { tensors.finish(stream, what); });
  on_->stream.wait();
}

void CudaRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  guarded([&] {
    finish_state();
    const gpu::HostState state = download();
    arena_.execute([&] { gpu::write_rows(problem_, block_, state, out, lse, true); });
  });
}

}  // namespace keyfold::cuda

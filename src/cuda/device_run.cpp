// Chunks on the caller's stream.
#include "cuda/device_run.hpp"

#include "cuda/errors.hpp"
#include "gpu/cast.hpp"
#include "gpu/chunk.hpp"
#include "gpu/window.hpp"

namespace keyfold::cuda {
namespace {

std::int64_t aligned(std::int64_t bytes) { return gpu::round_up(bytes, 256); }

/// Where each part of the scratch begins; `end` is its size.
struct Parts {
  Parts(const gpu::Layout& layout, std::int64_t groups, std::int64_t rows) {
    const std::int64_t states = layout.states(groups, rows), partials = layout.partial_rows(rows);
    state = q + aligned(layout.q(states));
    partial_o = state + aligned(layout.state(states));
    partial_ml = partial_o + aligned(layout.o(partials));
    flags = partial_ml + aligned(layout.ml(partials));
    prepared = flags + aligned(layout.flags(groups, rows));
    cuts = prepared + aligned(layout.prepared(groups, rows));
    batches = cuts + aligned(layout.cuts(groups, rows));
    end = batches +
          aligned(layout.problem.shape.batch * static_cast<std::int64_t>(sizeof(gpu::Batch)));
  }
  std::int64_t q = 0, state = 0, partial_o = 0, partial_ml = 0, flags = 0, prepared = 0, cuts = 0,
               batches = 0, end = 0;
};

gpu::Address address_of(const TensorView& tensor) {
  return reinterpret_cast<gpu::Address>(tensor.data);
}

/// Whether kernels, and the copy engine that some use, can read the tensor where it is.
bool in_place(const TensorView& tensor) {
  const bool steps = tensor.sizes[2] == 1 || tensor.strides[2] != 0;
  return steps && gpu::in_words(tensor, address_of(tensor));
}

}  // namespace

std::int64_t DeviceRun::scratch_bytes(const gpu::Layout& layout, std::int64_t groups,
                                      std::int64_t rows) {
  return Parts(layout, groups, rows).end + layout.gathered(groups, rows);
}

template <class Body>
decltype(auto) DeviceRun::guarded(const Body& body) {
  return guard_run(gpu_, *device_, body);
}

DeviceRun::DeviceRun(Gpu& gpu, const core::Problem& problem, const core::Block& block)
    : gpu_(gpu),
      problem_(problem),
      block_(block),
      shapes_(problem, gpu.traits()),
      layout_{problem, shapes_.tiling(), false} {
  guard_begin(gpu_, [&](const std::shared_ptr<Device>& device) {
    device_ = device;
    stream_.emplace(device_, problem.stream);
    tensors_.emplace(*device_, problem_);
    tensors_->preload();
    const Parts parts(layout_, groups(), rows());
    scratch_ = {*device_, stream_->get(), parts.end};
    const auto at = [&](std::int64_t part) {
      return scratch_.address() + static_cast<gpu::Address>(part);
    };
    memory_ = {at(parts.q), at(parts.state), at(parts.partial_o), at(parts.partial_ml),
               at(parts.flags)};
    if (parts.cuts > parts.prepared) memory_.prepared = at(parts.prepared);
    if (parts.batches > parts.cuts) {
      memory_.cuts = at(parts.cuts);
      device_->driver().memset_d8_async(memory_.cuts, static_cast<unsigned char>(0),
                                        gpu::usize(shapes_.cut_flag_bytes()), stream_->get());
    }
    batches_ = at(parts.batches);
    launcher_.emplace(*device_, block_, shapes_, layout_, memory_);
  });
}

gpu::Address DeviceRun::ml() const {
  return memory_.state + static_cast<gpu::Address>(layout_.o(gpu::states_of(layout_, block_)));
}

Ends DeviceRun::ends_of(const core::Chunk& chunk, bool in_place) const {
  Ends ends;
  const std::int64_t keys = chunk.box.key_end - chunk.box.key_begin;
  // Kernels that fold end rows only where they meet all keys in one launch.
  const bool at_once = !layout_.tiling.folds || layout_.prepared_at_once(groups(), rows(), keys);
  if (chunk.sole && in_place && at_once) {
    ends = results_of(problem_, block_, *problem_.device_out, problem_.device_lse);
    ends.begins = 1;
    if (!shapes_.ends_rows(ends)) ends = {};
  }
  const TensorRows q = rows_of(problem_.q, problem_.group_size(), block_.row_begin);
  if (shapes_.reads_queries(q)) ends.q = q;
  return ends;
}

void DeviceRun::begin_rows(const Ends& ends) {
  if (begun_) return;
  begun_ = true;
  Gather what{.place = place_of(problem_, block_),
              .from = rows_of(problem_.q, problem_.group_size(), block_.row_begin),
              .dim = gpu::u32(problem_.shape.head_dim),
              .padded_dim = gpu::u32(layout_.padded_head_dim()),
              .padded_value_dim = gpu::u32(layout_.padded_value_dim())};
  if (ends.q.at == 0) what.to = memory_.q;
  if (ends.begins == 0) what.o = memory_.state, what.ml = ml();
  if (what.to != 0 || what.o != 0) tensors_->gather(stream_->get(), what);
}

DeviceRun::~DeviceRun() {
  if (stream_ && !finished_) stream_->drain();
}

std::vector<ChunkBox> DeviceRun::boxes_of(const ChunkBox& box, bool in_place) const {
  if (in_place) return {box};
  // As many groups and keys as the window holds, again and again: what reads one is queued before
  // the next.
  const std::int64_t bytes = layout_.gathered(groups(), rows()), split = layout_.split_len();
  const std::int64_t most_groups =
      std::min(box.group_end - box.group_begin, bytes / (layout_.key_bytes(1) * split));
  const std::int64_t most_keys = bytes / layout_.key_bytes(most_groups) / split * split;
  std::vector<ChunkBox> boxes;
  for (std::int64_t group = box.group_begin; group < box.group_end; group += most_groups) {
    for (std::int64_t key = box.key_begin; key < box.key_end; key += most_keys) {
      boxes.push_back(box);
      boxes.back().group_begin = group;
      boxes.back().group_end = std::min(box.group_end, group + most_groups);
      boxes.back().key_begin = key;
      boxes.back().key_end = std::min(box.key_end, key + most_keys);
    }
  }
  return boxes;
}

void DeviceRun::point_at_mask(const ChunkBox& box, gpu::Params& params) const {
  if (!problem_.mask) return;
  const TensorView& mask = *problem_.mask;
  const std::int64_t size = size_of(mask.dtype);
  params.mask_batch = mask.strides[0] * size;
  params.mask_head = mask.strides[1] * size;
  params.mask_row = mask.strides[2] * size;
  params.mask_key = mask.strides[3] * size;
  params.mask = address_of(mask) + static_cast<gpu::Address>(block_.row_begin * params.mask_row +
                                                             box.key_begin * params.mask_key);
}

DeviceRun::Piece DeviceRun::piece_of(const ChunkBox& box, const core::KeySource& source,
                                     const Ends& ends, bool in_place) const {
  gpu::Params params = launcher_->describe(box, gpu::batches_alike(problem_) ? 0 : batches_);
  if (in_place) {
    gpu::point_at_tensors(box, source, address_of(source.k), address_of(source.v), params);
  } else {
    gpu::point_at_window(layout_, box, window_.address(), params);
  }
  point_at_mask(box, params);
  return {box, params, launcher_->plan(box, params, ends)};
}

void DeviceRun::gather_keys(const ChunkBox& box, const core::KeySource& source) const {
  const std::int64_t keys = box.key_end - box.key_begin;
  const std::int64_t count = (box.group_end - box.group_begin) * keys;
  gpu::Address to = window_.address();
  for (const auto& [tensor, pitch] :
       {std::pair{&source.k, layout_.k_pitch()}, {&source.v, layout_.v_pitch()}}) {
    tensors_->gather(stream_->get(),
                     {.place = {.group = static_cast<std::uint32_t>(box.group_begin),
                                .kv_heads = static_cast<std::uint32_t>(problem_.shape.num_kv_heads),
                                .heads = 1,
                                .indices = static_cast<std::uint32_t>(keys),
                                .count = static_cast<std::uint64_t>(count)},
                      .from = rows_of(*tensor, 1, box.key_begin - source.first_key),
                      .to = to,
                      .dim = static_cast<std::uint32_t>(tensor->sizes[3]),
                      .padded_dim = static_cast<std::uint32_t>(pitch / layout_.element())});
    to += static_cast<gpu::Address>(count * pitch);
  }
}

void DeviceRun::submit(const core::Chunk& chunk, const core::KeySource& source) {
  guarded([&] {
    const bool there = in_place(source.k) && in_place(source.v);
    if (!there && window_.address() == 0) {
      window_ = {*device_, stream_->get(), layout_.gathered(groups(), rows())};
    }
    const Ends ends = ends_of(chunk, there);
    std::vector<Piece> pieces;
    for (const ChunkBox& box : boxes_of(chunk.box, there)) {
      pieces.push_back(piece_of(box, source, ends, there));
    }
    begin_rows(ends);
    ended_ = ends.out.at != 0;
    // The last submission of a problem is not waited for.
    const bool last = chunk.sole && block_.group_end == problem_.num_groups() &&
                      block_.row_end == problem_.shape.q_len;
    const auto record = [&] {
      for (const Piece& piece : pieces) {
        if (!there) gather_keys(piece.box, source);
        if (piece.params.batches != 0) {
          tensors_->batches(stream_->get(), layout_, block_, piece.box, batches_);
        }
        launcher_->run(stream_->get(), piece.launches);
      }
    };
    stream_->submit(record, !last);
    submitted_flops_.push_back(chunk.flops);
  });
}

double DeviceRun::wait() {
  const double flops = submitted_flops_.front();
  submitted_flops_.pop_front();
  if (stream_->capturing()) return flops / shapes_.flops_per_second();
  return guarded([&] { return stream_->wait(); });
}

void DeviceRun::merge(core::Run&) {
  throw RunError(ErrorCode::kUnsupported, "states of tensors on a device can't be merged");
}

void DeviceRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  guarded([&] {
    if (!ended_) {
      begin_rows({});
      tensors_->finish(stream_->get(), {.place = place_of(problem_, block_),
                                        .o = memory_.state,
                                        .ml = ml(),
                                        .ends = results_of(problem_, block_, out, lse),
                                        .padded_value_dim = layout_.padded_value_dim()});
    }
    finished_ = true;
  });
}

}  // namespace keyfold::cuda

// Arguments and grids.
#include "cuda/tensors.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "gpu/cast.hpp"
#include "gpu/chunk.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::uint32_t kWarps = 8;  // of a block; each takes a row
constexpr std::uint32_t kThreads = 32 * kWarps;
constexpr std::uint32_t kMostBatches = kThreads;  // of a launch

struct KnownBatches {
  gpu::Address to = 0;
  std::uint32_t count = 0;
  std::array<gpu::Batch, kMostBatches> batch;
};

struct LengthBatches {
  gpu::Address to = 0, lengths = 0;
  std::int64_t kv_len = 0, q_len = 0;
  std::int64_t q_offset = 0;
  std::int64_t left = -1, right = -1;
  std::int64_t row = 0, key = 0;
  std::uint32_t num_keys = 0, count = 0;
  std::uint32_t q_offset_given = 0;
};

// As the compiler of kernels lays them out.
static_assert(sizeof(RowsPlace) == 24);
static_assert(sizeof(Gather) == 24 + 48 + 3 * 8 + 4 * 4);
static_assert(sizeof(Finish) == 24 + 2 * 8 + sizeof(Ends) + 8);
static_assert(sizeof(KnownBatches) == 16 + 12 * kMostBatches);
static_assert(sizeof(LengthBatches) == 9 * 8 + 4 * 4);

KernelSpec spec_of(const char* entry, DType dtype) {
  return {.file = "tensors.cu",
          .entry = entry,
          .options = {"--std=c++17", "--fmad=false",
                      "-DKEYFOLD_DTYPE=" + std::to_string(static_cast<int>(dtype))},
          .threads = kThreads};
}

using gpu::u32;

}  // namespace

RowsPlace place_of(const core::Problem& problem, const core::Block& block) {
  const std::int64_t heads = problem.group_size();
  const std::int64_t indices = (block.row_end - block.row_begin) * heads;
  return {.group = u32(block.group_begin),
          .kv_heads = u32(problem.shape.num_kv_heads),
          .heads = u32(heads),
          .indices = u32(indices),
          .count = static_cast<std::uint64_t>((block.group_end - block.group_begin) * indices)};
}

std::vector<KernelSpec> TensorKernels::specs(DType dtype) {
  return {spec_of("gather", dtype), spec_of("finish", dtype), spec_of("known_batches", dtype),
          spec_of("length_batches", dtype)};
}

void TensorKernels::preload() const {
  const bool lengths = problem_.device_kv_lens != nullptr;
  for (const char* entry : {"gather", "finish", lengths ? "length_batches" : "known_batches"})
    device_.modules().get(spec_of(entry, problem_.shape.dtype));
}

void TensorKernels::launch(CUstream stream, const char* entry, std::int64_t blocks,
                           const void* params) const {
  const CUfunction function = device_.modules().get(spec_of(entry, problem_.shape.dtype));
  std::array<void*, 1> arguments{const_cast<void*>(params)};  // the driver only reads it
  device_.driver().launch(function, {u32(blocks), 1, 1}, kThreads, 0, stream, arguments.data());
}

void TensorKernels::gather(CUstream stream, const Gather& what) const {
  launch(stream, "gather", gpu::ceil_div(static_cast<std::int64_t>(what.place.count), kWarps),
         &what);
}

void TensorKernels::finish(CUstream stream, const Finish& what) const {
  launch(stream, "finish", gpu::ceil_div(static_cast<std::int64_t>(what.place.count), kWarps),
         &what);
}

void TensorKernels::batches(CUstream stream, const gpu::Layout& layout, const core::Block& block,
                            const ChunkBox& box, gpu::Address to) const {
  const std::int64_t batch = problem_.shape.batch;
  if (problem_.device_kv_lens != nullptr) {
    const LengthBatches what{.to = to,
                             .lengths = reinterpret_cast<gpu::Address>(problem_.device_kv_lens),
                             .kv_len = problem_.shape.kv_len,
                             .q_len = problem_.shape.q_len,
                             .q_offset = problem_.q_offset.front(),
                             .left = problem_.window_left.value_or(-1),
                             .right = problem_.window_right.value_or(-1),
                             .row = block.row_begin,
                             .key = box.key_begin,
                             .num_keys = u32(box.key_end - box.key_begin),
                             .count = u32(batch),
                             .q_offset_given = problem_.q_offset_given ? 1u : 0u};
    return launch(stream, "length_batches", gpu::ceil_div(batch, kThreads), &what);
  }
  std::vector<gpu::Batch> all(static_cast<std::size_t>(batch));
  gpu::write_batches(layout, block, box, reinterpret_cast<std::byte*>(all.data()));
  for (std::int64_t first = 0; first < batch; first += kMostBatches) {
    KnownBatches what;
    what.to = to + static_cast<gpu::Address>(first) * sizeof(gpu::Batch);
    what.count = u32(std::min<std::int64_t>(kMostBatches, batch - first));
    std::memcpy(what.batch.data(), &all[static_cast<std::size_t>(first)],
                what.count * sizeof(gpu::Batch));
    launch(stream, "known_batches", 1, &what);
  }
}

}  // namespace keyfold::cuda

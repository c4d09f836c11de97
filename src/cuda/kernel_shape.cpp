#include "cuda/kernel_shape.hpp"

#include <algorithm>
#include <bit>

#include "gpu/kernel_options.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::uint32_t kVec4Bytes = 16;
constexpr std::uint32_t kDecodeRegisters = 64;  // floats of q, or of the output, in a thread

std::uint32_t ceil_div(std::uint32_t a, std::uint32_t b) { return (a + b - 1) / b; }

struct Dims {
  explicit Dims(const ShapeQuery& query)
      : elements(query.dtype == DType::kFloat32 ? 4 : 8),
        head_words(gpu::padded_dim(query.dtype, query.head_dim) / elements),
        value_words(gpu::padded_dim(query.dtype, query.value_dim) / elements),
        value_vecs(value_words * elements / 4) {}
  std::uint32_t elements;  ///< in a 16-byte word
  std::uint32_t head_words, value_words, value_vecs;
};

/// As attend.cu lays it out.
std::uint32_t shared_bytes(const AttendShape& s, std::uint32_t elements) {
  const std::uint32_t slices = 2 * s.slice_words * elements * (s.rows() + s.keys()) / 4;
  const std::uint32_t weights = s.keys() * s.rows() / 4;
  const std::uint32_t values = 2 * s.slice_keys * s.groups * s.tx;
  return (std::max(slices, weights) + values) * kVec4Bytes + s.rows() * 16 + 4;
}

/// Lanes that share a row of `words` words.
std::uint32_t lanes_for(std::uint32_t words) { return std::min(std::bit_ceil(words), kWarp); }

}  // namespace

AttendShape attend_shape(const ShapeQuery& query) {
  const Dims dims(query);
  // Accumulators of scores and of outputs have to stay in registers together.
  AttendShape s;
  if (dims.value_vecs <= 32) {
    s = {.ty = 8, .tx = 16, .tr = 8, .tc = 8};
  } else if (dims.value_vecs <= 64) {
    s = {.ty = 16, .tx = 16, .tr = 4, .tc = 8};
  } else {
    s = {.ty = 8, .tx = 32, .tr = 4, .tc = 4};
  }
  s.groups = ceil_div(dims.value_vecs, s.tx);
  s.slice_words = 2;
  s.slice_keys = 8;
  s.shared_bytes = shared_bytes(s, dims.elements);
  while (s.shared_bytes > kMaxSharedBytes && s.slice_keys > 4) {
    s.slice_keys /= 2;
    s.shared_bytes = shared_bytes(s, dims.elements);
  }
  return s;
}

std::optional<WgmmaShape> wgmma_shape(const ShapeQuery& query) {
  constexpr std::uint32_t kShared = 227 << 10;  // of a block on Hopper
  constexpr std::uint32_t kStages = 2, kBarriers = 16 + 32 * kStages;
  const auto width = [](std::int64_t dim) {
    return ceil_div(static_cast<std::uint32_t>(dim), 64) * 64;
  };
  const std::uint32_t head = width(query.head_dim), value = width(query.value_dim);
  if (query.dtype == DType::kFloat32 || head > 256 || value > 256) return std::nullopt;
  WgmmaShape s;
  // Three warpgroups have 160 registers a thread: enough for an output of 64 columns.
  s.warpgroups = head <= 64 && value <= 64 ? 3 : 2;
  for (s.keys = 128; s.keys > 64; s.keys -= s.keys == 128 ? 32 : 16) {
    s.shared_bytes = 2 * (s.rows() * head + kStages * s.keys * (head + value)) + kBarriers;
    const std::uint32_t registers = s.keys / 2 + s.keys / 4 + value / 2;  // scores, weights, output
    if (s.shared_bytes <= kShared && registers <= 192) return s;
  }
  return std::nullopt;
}

std::optional<Wgmma3Shape> wgmma3_shape(const ShapeQuery& query) {
  constexpr std::uint32_t kShared = 227 << 10;  // of a block on Hopper
  const auto panels = [](std::int64_t dim) {
    return ceil_div(static_cast<std::uint32_t>(dim), 64);
  };
  const std::uint32_t head = panels(query.head_dim), value = panels(query.value_dim);
  if (query.dtype != DType::kFloat32 || head > 4 || value > 4) return std::nullopt;
  Wgmma3Shape s;
  // As many rows as registers hold the output of, and as many keys as shared memory the stages of.
  s.warpgroups = head == 1 && value == 1 ? 3 : 2;
  s.keys = std::max(head, value) <= 2 ? 64 : 32;
  const std::uint32_t panel = 2 * 128 * s.keys, record = 12 * s.keys + 16;  // bytes
  const std::uint32_t queries = 2 * 128 * s.rows() * head;
  const std::uint32_t stage = std::max(head, value) * panel + record + 16;  // and two barriers
  s.stages = std::min(6u, (kShared - queries) / stage);
  s.shared_bytes = queries + s.stages * stage;
  s.tile_bytes = (head + value) * panel + record;
  return s;
}

DecodeShape decode_shape(const ShapeQuery& query) {
  const Dims dims(query);
  DecodeShape s;
  s.warps = 4;
  s.head_lanes = lanes_for(dims.head_words);
  s.value_lanes = lanes_for(dims.value_words);
  const std::uint32_t per_row = dims.elements * std::max(ceil_div(dims.head_words, s.head_lanes),
                                                         ceil_div(dims.value_words, s.value_lanes));
  s.row_limit = 8;
  while (s.row_limit > 1 && s.row_limit * per_row > kDecodeRegisters) s.row_limit /= 2;
  return s;
}

std::uint32_t DecodeShape::rows(std::int64_t num_indices) const {
  const auto wanted = static_cast<std::uint32_t>(std::min<std::int64_t>(num_indices, row_limit));
  return std::bit_ceil(std::max(wanted, 1u));
}

MergeShape merge_shape(const ShapeQuery& query, bool many) {
  constexpr std::uint32_t kThreads = 128;
  const std::uint32_t dim = gpu::padded_dim(query.dtype, query.value_dim);
  MergeShape s;
  s.lanes = std::clamp(std::bit_ceil(dim), kWarp, kThreads);
  s.rows = kThreads / s.lanes;
  s.ahead = many ? 32 : 4;
  return s;
}

}  // namespace keyfold::cuda

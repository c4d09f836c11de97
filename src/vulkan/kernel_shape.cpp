#include "vulkan/kernel_shape.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <tuple>

#include "gpu/kernel_options.hpp"

namespace keyfold::vulkan {
namespace {

constexpr std::uint32_t kVec4Bytes = 16;
constexpr std::uint32_t kDecodeRegisters = 64;      // floats of q, or of the output, in a thread
constexpr std::uint32_t kMatrixRegisters = 128;     // elements of q, or of the output, in a thread
constexpr std::uint32_t kMatrixShared = 48 * 1024;  // drivers lose devices that are asked for more

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

/// As attend.comp declares it.
std::uint32_t shared_bytes(const AttendShape& s, std::uint32_t elements) {
  const std::uint32_t slices = 2 * s.slice_words * elements * (s.rows() + s.keys()) / 4;
  const std::uint32_t weights = s.keys() * s.rows() / 4;
  const std::uint32_t values = 2 * s.slice_keys * s.groups * s.tx;
  return (std::max(slices, weights) + values) * kVec4Bytes + s.rows() * 8 + 4;
}

/// As matrix.comp declares it, with a mask.
std::uint32_t shared_bytes(const MatrixShape& s, const Dims& dims, bool in_registers) {
  const std::uint32_t head_steps = ceil_div(dims.head_words * dims.elements, s.size);
  const std::uint32_t value_tiles = ceil_div(dims.value_words * dims.elements, s.size);
  const std::uint32_t head = s.keys * (head_steps * s.size / 8 + 1);
  const std::uint32_t value = s.keys * (value_tiles * s.size / 8 + 1);
  const std::uint32_t tile = s.shared != 0 ? std::max(head, value) : head + value;
  const std::uint32_t marks = s.rows() * ceil_div(dims.value_words, 8);
  const std::uint32_t aside = head_steps - std::min(head_steps, s.held);
  const std::uint32_t queries = aside == 0 ? 0 : s.rows() * (aside * s.size / 8 + 1);
  const std::uint32_t matrix = s.size * s.size * 4;
  const std::uint32_t weights = s.subgroups * matrix + s.rows() * s.keys * 2;
  return (std::max(tile, marks) + queries) * kVec4Bytes + matrix + s.rows() * 24 + 4 +
         kMatrixSplitLen / 8 + (in_registers ? 0 : weights);
}

/// As decode.comp declares it.
std::uint32_t shared_bytes(const DecodeShape& s, const Dims& dims) {
  const std::uint32_t parts = ceil_div(dims.value_words, s.value_lanes) * dims.elements / 4;
  return s.row_limit * kDecodeSplitLen * 4 + s.subgroups * s.value_lanes * parts * kVec4Bytes +
         s.row_limit * 16 + 4;
}

/// Lanes that share a row of `words` words.
std::uint32_t lanes_for(std::uint32_t words, std::uint32_t subgroup_size) {
  return std::min(std::bit_ceil(words), subgroup_size);
}

}  // namespace

AttendShape attend_shape(const ShapeQuery& query) {
  const Dims dims(query);
  const bool large = query.subgroup_size >= 32 && query.max_shared_bytes >= 48 * 1024;
  // Accumulators of scores and of outputs have to stay in registers together.
  AttendShape s;
  if (large && dims.value_vecs <= 32) {
    s = {.ty = 8, .tx = 16, .tr = 8, .tc = 8, .slice_words = 16 / dims.elements};
  } else if (large && dims.value_vecs <= 64 && query.max_workgroup_invocations >= 256) {
    s = {.ty = 16, .tx = 16, .tr = 4, .tc = 8};
  } else if (large && query.max_workgroup_invocations >= 512) {
    s = {.ty = 16, .tx = 32, .tr = 4, .tc = 4};
  } else {
    s = {.ty = 8, .tx = std::bit_floor(std::min(query.subgroup_size, 16u)), .tr = 4, .tc = 4};
  }
  s.groups = ceil_div(dims.value_vecs, s.tx);
  if (s.slice_words == 0) s.slice_words = 2;
  s.slice_keys = std::min(8u, s.keys());
  const auto too_large = [&] {
    s.shared_bytes = shared_bytes(s, dims.elements);
    return s.shared_bytes > query.max_shared_bytes;
  };
  while (too_large() && s.slice_keys > 4) s.slice_keys /= 2;
  while (too_large() && s.slice_words > 1) s.slice_words /= 2;
  while (too_large() && s.ty > 1) s.ty /= 2;
  s.woven = s.ty > 1 && s.tx < query.subgroup_size ? 2 : 1;
  if (too_large() || s.workgroup() > query.max_workgroup_invocations) {
    throw std::invalid_argument("the prefill kernel needs more shared memory or threads");
  }
  return s;
}

std::optional<MatrixShape> matrix_shape(const ShapeQuery& query, std::uint32_t size,
                                        bool in_registers) {
  const Dims dims(query);
  const std::uint32_t columns = std::max(dims.head_words, dims.value_words) * dims.elements;
  const std::uint32_t most = std::min(query.max_shared_bytes, kMatrixShared);
  MatrixShape s{.subgroup_size = query.subgroup_size, .size = size};
  const auto fits = [&] {
    s.shared_bytes = shared_bytes(s, dims, in_registers);
    return s.workgroup() <= query.max_workgroup_invocations && s.shared_bytes <= most;
  };
  // Elements of q, or of the output, in a thread. As measured on an H100 at 32, 64 and 128: two
  // blocks' output fits beside their scores, which halves what is loaded, as long as q stays in
  // shared memory; one block's and q, or two where m and l take few registers; one block's and what
  // of q shared memory has no room for beside 32 keys, with V in the place of K.
  const std::uint32_t registers = ceil_div(size * columns, query.subgroup_size);
  if (registers > kMatrixRegisters) return std::nullopt;
  if (registers <= kMatrixRegisters / 4) {
    s.subgroups = 4, s.keys = 64, s.blocks = 2, s.held = 0;
    if (fits()) return s;
  } else if (registers <= kMatrixRegisters / 2 && query.pairs && in_registers) {
    s.subgroups = 4, s.keys = 32, s.blocks = 2, s.held = 3;
    if (fits()) return s;
  } else if (registers > kMatrixRegisters / 2) {
    s.subgroups = 4, s.keys = 32, s.held = 5, s.shared = 1;
    if (fits()) return s;
  }
  s.blocks = 1, s.held = MatrixShape::kAll, s.shared = 0;
  for (s.subgroups = 8; s.subgroups > 0; s.subgroups /= 2) {
    for (s.keys = 64; s.keys >= size; s.keys /= 2) {
      if (fits()) return s;
    }
  }
  return std::nullopt;
}

std::uint32_t row_pairs(const ElementRows& rows) {
  constexpr std::size_t kLanes = std::tuple_size_v<ElementRows>, kElements = 8;
  std::uint32_t pairs = 0;
  for (std::size_t e = 0; e < kElements; ++e) pairs |= (rows[0][e] != rows[0][0] ? 1U : 0U) << e;
  if (std::popcount(pairs) != 4) return 0;
  std::uint32_t seen = 0;  // rows, by the first of their four lanes
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    const std::array<int, 2> two{rows[lane][0],
                                 rows[lane][static_cast<std::size_t>(std::countr_zero(pairs))]};
    for (std::size_t e = 0; e < kElements; ++e) {
      if (rows[lane][e] != two[pairs >> e & 1] || rows[lane][e] < 0 || rows[lane][e] > 15) return 0;
    }
    if (lane % 4 != 0) {
      if (rows[lane] != rows[lane - 1]) return 0;
    } else {
      seen |= 1U << two[0] | 1U << two[1];
    }
  }
  return seen == 0xffff ? pairs : 0;
}

DecodeShape decode_shape(const ShapeQuery& query) {
  const Dims dims(query);
  DecodeShape s;
  s.subgroup_size = query.subgroup_size;
  s.subgroups = std::clamp(query.max_workgroup_invocations / query.subgroup_size, 1u, 4u);
  s.head_lanes = lanes_for(dims.head_words, query.subgroup_size);
  s.value_lanes = lanes_for(dims.value_words, query.subgroup_size);
  const std::uint32_t per_row = dims.elements * std::max(ceil_div(dims.head_words, s.head_lanes),
                                                         ceil_div(dims.value_words, s.value_lanes));
  s.row_limit = 8;
  const auto too_large = [&] {
    s.shared_bytes = shared_bytes(s, dims);
    return s.shared_bytes > query.max_shared_bytes;
  };
  while (s.row_limit > 1 && (s.row_limit * per_row > kDecodeRegisters || too_large())) {
    s.row_limit /= 2;
  }
  while (too_large() && s.subgroups > 1) s.subgroups /= 2;
  if (too_large()) throw std::invalid_argument("the decode kernel needs more shared memory");
  return s;
}

std::uint32_t DecodeShape::rows(std::int64_t num_indices) const {
  const auto wanted = static_cast<std::uint32_t>(std::min<std::int64_t>(num_indices, row_limit));
  return std::bit_ceil(std::max(wanted, 1u));
}

MergeShape merge_shape(const ShapeQuery& query, bool many) {
  constexpr std::uint32_t kThreads = 128;  // every device has as many, in whole subgroups
  const std::uint32_t dim = gpu::padded_dim(query.dtype, query.value_dim);
  MergeShape s;
  s.lanes = std::clamp(std::bit_ceil(dim), 32u, kThreads);
  s.rows = kThreads / s.lanes;
  s.ahead = many ? 64 : 4;
  s.batch = many ? std::min(256u, 512u / s.rows) : 16;
  return s;
}

}  // namespace keyfold::vulkan

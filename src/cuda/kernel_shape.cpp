#include "cuda/kernel_shape.hpp"

#include <algorithm>
#include <bit>

#include "gpu/kernel_options.hpp"
#include "gpu/layout.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::uint32_t kVec4Bytes = 16;
constexpr std::uint32_t kOfBlock = 1 << 10;     // shared memory of a block that the system takes
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

namespace {

// What wgmma.cu has in shared memory beside slots for parts of tiles.
constexpr std::uint32_t kHopperShared = 227 << 10;         // of a block
constexpr std::uint32_t kMostMarks = 4, kOfMark = 16 + 8;  // barriers, and what is said of marks
std::uint32_t panels_of(std::int64_t dim) { return ceil_div(static_cast<std::uint32_t>(dim), 64); }
std::uint32_t slot_bytes(const WgmmaShape& s) { return s.part_panels * s.keys * 128; }
std::uint32_t room_of(const WgmmaShape& s, std::uint32_t head_panels) {
  constexpr std::uint32_t kRecords = 4 * 44;  // of jobs
  return kHopperShared - s.rows() * head_panels * 128 - 16 * s.warpgroups - kRecords;
}

}  // namespace

std::optional<WgmmaShape> wgmma_shape(const ShapeQuery& query, std::int64_t num_rows, bool masked,
                                      std::int64_t most_tiles) {
  const std::uint32_t head = panels_of(query.head_dim), value = panels_of(query.value_dim);
  if (query.dtype == DType::kFloat32 || head > 4 || value > 4) return std::nullopt;
  WgmmaShape s;
  // Scores and outputs of three warpgroups have to stay within 160 registers a thread, those of two
  // within 232.
  s.value_panels = value;
  s.warpgroups = value <= 2 ? 3 : 2;
  s.keys = value == 1 ? 192 : 128;
  const bool few = num_rows <= 1024;
  if (!masked && value <= 2) {
    // Two, with products ahead, where they leave fewer rows empty, or all tiles are one round.
    const std::int64_t of_two = gpu::ceil_div(num_rows, 128),
                       of_three = gpu::ceil_div(num_rows, 192);
    if (few ? 2 * of_two < 3 * of_three : of_two <= most_tiles) s.warpgroups = 2;
  }
  if (few) {
    // Splits of about the same work, whatever the rows.
    const std::uint32_t work = 16 * std::bit_ceil(static_cast<std::uint32_t>(num_rows));
    s.partial_len = std::clamp(work, 2048u, 8192u) / s.keys * s.keys;
  }
  s.weighings = value == 1 ? 4 : 2;
  s.part_panels = s.keys != 128 ? 1 : head % 2 == 0 ? 2 : head;
  s.part_keys = s.keys;
  while (s.part_keys * value > s.keys * s.part_panels) s.part_keys /= 2;
  const std::uint32_t slot = slot_bytes(s), marks = s.rows() * s.keys / 8 + kOfMark;
  const std::uint32_t room = room_of(s, head);
  s.slots = (room - (masked ? marks : 0)) / (slot + 16);
  if (masked) s.mark_slots = std::min(kMostMarks, (room - s.slots * (slot + 16)) / marks);
  s.shared_bytes = kHopperShared - room + s.slots * (slot + 16) + s.mark_slots * marks;
  return s;
}

std::optional<WgmmaShape> with_biases(const ShapeQuery& query, WgmmaShape s, std::uint32_t size,
                                      std::uint32_t rows) {
  const std::uint32_t head = panels_of(query.head_dim), slot = slot_bytes(s) + 16;
  const std::uint32_t room = room_of(s, head) - kMostMarks * kOfMark;
  const std::uint32_t panels = s.keys * size / 128, panel = ceil_div(rows, 8) * 1024;
  const std::uint32_t key_parts = head / s.part_panels, value_parts = s.keys / s.part_keys;
  const std::uint32_t least_slots = std::max({2u, key_parts, value_parts});  // full at once
  const auto fits = [&](std::uint32_t slots, std::uint32_t parts, std::uint32_t least) {
    const std::uint32_t bytes = panels / parts * panel + 16;
    if (slots * slot + least * bytes > room) return false;
    s.slots = slots;
    s.mark_slots = kMostMarks;
    s.bias_parts = parts;
    s.bias_slots = std::max(least, std::min(kMostMarks, (room - slots * slot) / bytes));
    s.shared_bytes = kHopperShared - room + slots * slot + s.bias_slots * bytes;
    return true;
  };
  // Waits between parts cost more than slots for K and V. So tiles of values come as one, two at a
  // time or one, beside a tile and a half of K and V; where they are too large, by panels,
  // and these all at once, if that can be.
  const std::uint32_t all = s.slots, half_more = 3 * (key_parts + value_parts) / 2;
  for (const std::uint32_t least : {2u, 1u}) {
    for (std::uint32_t slots = all; slots >= std::max(least_slots, std::min(all - 1, half_more));
         --slots) {
      if (fits(slots, 1, least)) return s;
    }
  }
  for (const std::uint32_t least : {panels, 2u}) {
    for (std::uint32_t slots = all; slots >= least_slots; --slots) {
      if (fits(slots, panels, least)) return s;
    }
  }
  return std::nullopt;
}

std::optional<MmaShape> mma_shape(const ShapeQuery& query, bool masked,
                                  std::uint32_t max_shared_bytes) {
  const bool single = query.dtype == DType::kFloat32;
  const std::uint32_t element = single ? 4 : 2;
  const auto head = static_cast<std::uint32_t>(query.head_dim);
  const auto value = static_cast<std::uint32_t>(query.value_dim);
  const std::uint32_t widest = std::max(head, value);
  // Accumulators of scores and of outputs have to stay in registers together.
  MmaShape s;
  if (widest <= 128) {
    s = {.blocks = single ? 1u : 2u, .row_warps = 4, .column_warps = 1, .keys = single ? 32u : 64u};
  } else if (widest <= 256) {
    s = {.blocks = 1, .row_warps = 8, .column_warps = 1, .keys = single ? 16u : 64u};
    if (single && widest <= 192) s.keys = 32;
  } else if (widest <= 512) {
    s = {.blocks = 1,
         .row_warps = single ? 2u : 4u,
         .column_warps = single ? 4u : 2u,
         .keys = single ? 16u : 32u};
  } else {
    s = {.blocks = 1, .row_warps = single ? 2u : 4u, .column_warps = 3, .keys = 16};
  }
  // Rows of tiles are whole lines of 128 bytes, and so are the parts of several column warps.
  const auto row_bytes = [&](std::uint32_t dim) {
    return ceil_div(ceil_div(dim, s.column_warps) * element, 128) * s.column_warps * 128;
  };
  const std::uint32_t key_bytes = row_bytes(head) + row_bytes(value);
  const std::uint32_t part_bytes = s.column_warps > 1 ? s.column_warps * s.keys * 4 : 0;
  const std::uint32_t q_bytes = row_bytes(head) + part_bytes + (masked ? 16 : 8);
  for (; s.row_warps > 0; s.row_warps /= 2) {
    for (s.stages = 2; s.stages > 0; --s.stages) {
      s.shared_bytes = s.rows() * q_bytes + s.stages * s.keys * key_bytes;
      if (s.shared_bytes > max_shared_bytes) continue;
      s.resident = std::min(std::max(1u, 256 / s.threads()),
                            (max_shared_bytes + kOfBlock) / (s.shared_bytes + kOfBlock));
      return s;
    }
  }
  return std::nullopt;
}

namespace {

constexpr auto round_up = [](std::uint32_t x, std::uint32_t to) { return ceil_div(x, to) * to; };

/// Bytes of a row of decode's tiles in shared memory.
std::uint32_t decode_pitch(std::uint32_t elements) {
  const std::uint32_t words = elements / 8;
  return 16 * (words % 8 == 0 ? words : words | 1);
}

}  // namespace

std::optional<DecodeClusterShape> decode_cluster_shape(const ShapeQuery& query,
                                                       const DecodeMmaShape& as,
                                                       std::uint32_t max_shared_bytes) {
  if (as.row_team != 1 || as.column_team != 1) return std::nullopt;
  const std::uint32_t head = round_up(static_cast<std::uint32_t>(query.head_dim), 16),
                      value = round_up(static_cast<std::uint32_t>(query.value_dim), 16);
  const std::uint32_t keys = kDecodeMmaUnitLen / as.streams, rows = as.rows();
  const std::uint32_t slot =
      round_up(as.step * std::max(decode_pitch(head), decode_pitch(value)), 128);
  DecodeClusterShape s;
  s.steps = keys / as.step;
  s.tile_rows = as.tile_rows;
  s.part_bytes = s.steps * slot;
  for (s.resident = 2; s.resident > 0; --s.resident) {
    // Four leaves take a block that is alone as long as a unit takes one of decode_mma.cu.
    for (s.leaves = s.resident > 1 ? 2 : 4; s.leaves > 0; s.leaves /= 2) {
      // As decode_cluster.cu lays it out.
      s.fixed_bytes =
          round_up(round_up(rows * decode_pitch(head), 128) + keys * (64 + 32) +
                       2 * s.steps * rows * 4 + s.leaves * as.tile_rows * (8 + (value + 8) * 4),
                   128);
      const std::uint32_t room = (max_shared_bytes + kOfBlock) / s.resident - kOfBlock;
      if (s.fixed_bytes > room) continue;
      s.slots = std::min(2 * s.leaves, (room - s.fixed_bytes) / s.part_bytes);
      if (query.head_dim != query.value_dim) s.slots = s.slots / 2 * 2;  // zeros of K and V differ
      if (s.slots >= 2) return s;
    }
  }
  return std::nullopt;
}

std::optional<std::uint32_t> DecodeClusterShape::blocks(std::uint32_t leaves_of_group,
                                                        std::uint32_t share) const {
  constexpr std::uint32_t kPortable = 8, kMost = 16;  // blocks of a cluster
  const auto within = [&](std::uint32_t most) {
    return std::min({leaves_of_group, most, std::bit_floor(std::max(share, 1u))});
  };
  std::uint32_t n = within(kPortable);
  // Few of Hopper's graphics processing clusters have room for 16 blocks alone; two on a
  // multiprocessor are faster than twice the leaves in each where rows are few.
  if (leaves_of_group > n * leaves && resident > 1 && tile_rows <= 8) n = within(kMost);
  if (leaves_of_group > n * leaves) return std::nullopt;
  return n;
}

std::optional<DecodeMmaShape> decode_mma_shape(const ShapeQuery& query, std::int64_t num_indices,
                                               std::uint32_t max_shared_bytes) {
  constexpr std::uint32_t kRingKeys = 64;  // more under way make memory slower
  if (query.dtype == DType::kFloat32) return std::nullopt;
  const std::uint32_t head = gpu::padded_dim(query.dtype, query.head_dim);
  const std::uint32_t value = gpu::padded_dim(query.dtype, query.value_dim);
  const auto up = round_up;
  DecodeMmaShape s;
  s.step = std::max(head, value) <= 80 ? 32 : 16;
  s.column_team = value <= 256 ? 1 : 4;
  s.streams = value <= 256 ? 4 : 2;
  // As decode_mma.cu lays it out.
  const std::uint32_t width =
      s.column_team == 1 ? up(value, 16) : up(value, 64 * s.column_team) / s.column_team;
  const std::uint32_t value_width = width * s.column_team;
  const std::uint32_t head_pitch = decode_pitch(up(head, 16)),
                      value_pitch = decode_pitch(value_width);
  const std::uint32_t slot = up(s.step * std::max(head_pitch, value_pitch), 128);
  const bool paired = head != value && (head % 16 != 0 || value_width != value);
  const auto fits = [&] {
    s.tile_rows = up(static_cast<std::uint32_t>(std::min<std::int64_t>(num_indices, s.rows())), 8);
    const std::uint32_t fixed =
        2 * up(s.rows() * head_pitch, 128) + s.streams * 8 * s.row_team * (value_width + 8) * 4 +
        s.levels * s.tile_rows * (4 * value + 8) +
        (s.tile_rows > 8 ? (s.streams - 1 + s.levels) * s.tile_rows * 8 : 0) +
        s.streams * s.rows() * 8 + ceil_div(width, 32) * s.threads() * 4 + 16;
    const std::uint32_t room = (max_shared_bytes + kOfBlock) / s.resident - kOfBlock;
    if (room < fixed) return false;
    s.slots = std::min(kRingKeys / s.step, (room - fixed) / (s.streams * slot));
    if (paired) s.slots = s.slots / 2 * 2;
    s.shared_bytes = fixed + s.slots * s.streams * slot;
    return s.slots >= std::min(3u, kRingKeys / s.step);
  };
  constexpr std::uint32_t kMostLevels = std::bit_width(kDecodeMmaSplitLen / kDecodeMmaUnitLen);
  for (s.row_team = num_indices > 16 && value <= 128 && head <= 128 ? 2 : 1; s.row_team > 0;
       --s.row_team) {
    // Registers suffice for eight warps.
    for (s.resident = 8 / s.warps(); s.resident > 0; --s.resident) {
      for (s.levels = kMostLevels; s.levels-- > 0;) {
        if (fits()) return s;
      }
    }
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
  s.lanes = std::clamp(std::bit_ceil(dim / 4), kWarp / 2, kThreads);
  s.rows = kThreads / s.lanes;
  s.ahead = many ? 8 : 2;
  return s;
}

}  // namespace keyfold::cuda

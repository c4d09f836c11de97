// How the compute kernels are shaped for a device: the specialization constants from 16 on.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "keyfold/tensor.hpp"

namespace keyfold::vulkan {

/// What a shape depends on. Nothing else of the call or the device may enter: shapes decide the
/// order of sums, and so the bits of results.
struct ShapeQuery {
  DType dtype = DType::kFloat32;
  std::int64_t head_dim = 0;
  std::int64_t value_dim = 0;
  std::uint32_t subgroup_size = 0;  ///< that every kernel is to be run with
  std::uint32_t max_shared_bytes = 0;
  std::uint32_t max_workgroup_invocations = 0;
  bool pairs = false;  ///< whether row_pairs() is likely to find some
};

/// Keys of a split of each kernel: constants, as bits depend on them.
inline constexpr std::uint32_t kPrefillSplitLen = 1024;
inline constexpr std::uint32_t kMatrixSplitLen = 2048;
inline constexpr std::uint32_t kDecodeSplitLen = 512;

/// shaders/attend.comp. A workgroup is `ty` x `tx` threads of `tr` rows x `tc` keys.
struct AttendShape {
  std::uint32_t ty = 0, tx = 0, tr = 0, tc = 0;
  std::uint32_t groups = 0;       ///< of four columns of the output in a thread
  std::uint32_t slice_words = 0;  ///< 16-byte words of a row of q and k in shared memory
  std::uint32_t slice_keys = 0;   ///< rows of v in shared memory
  std::uint32_t woven = 1;        ///< rows of threads that neighbours in a subgroup are of
  std::uint32_t shared_bytes = 0;

  std::uint32_t workgroup() const { return ty * tx; }
  std::uint32_t rows() const { return ty * tr; }  ///< of a workgroup
  std::uint32_t keys() const { return tx * tc; }  ///< of a tile
  /// Constants 16, 17, ...; the last is kPartial.
  std::vector<std::uint32_t> constants(bool partial) const {
    return {ty, tx, tr, tc, groups, slice_words, slice_keys, woven, partial ? 1u : 0u};
  }
};

/// shaders/matrix.comp. A workgroup is `subgroups` subgroups of `blocks` x `size` rows.
struct MatrixShape {
  std::uint32_t subgroups = 0, subgroup_size = 0;
  std::uint32_t keys = 0;     ///< of a tile
  std::uint32_t size = 0;     ///< of one product: size x size x size
  std::uint32_t blocks = 1;   ///< of `size` rows, which share what a subgroup loads of k and v
  std::uint32_t held = kAll;  ///< steps of `size` columns of q in registers, not shared memory
  std::uint32_t shared = 0;   ///< 1: v takes k's place in shared memory
  std::uint32_t shared_bytes = 0;

  static constexpr std::uint32_t kAll = 128;  ///< more steps than there are

  std::uint32_t workgroup() const { return subgroups * subgroup_size; }
  std::uint32_t rows() const { return subgroups * blocks * size; }  ///< of a workgroup
  /// Constants 16, 17, ...; `partial` and `finished` are 0 or 1, `pairs` as row_pairs().
  std::vector<std::uint32_t> constants(std::uint32_t partial, std::uint32_t finished,
                                       std::uint32_t pairs) const {
    return {subgroups, keys, size, size, size, partial, finished, blocks, held, shared, pairs};
  }
};

/// The rows of a 16x16 accumulator's elements: of each of 32 lanes, of each element that it has.
using ElementRows = std::array<std::array<int, 8>, 32>;

/// For matrix.comp's kPairs: where four lanes side by side share two rows, half of a lane's
/// elements in each, a bit for each element that is of the second; else 0.
std::uint32_t row_pairs(const ElementRows& rows);

/// shaders/decode.comp. `row_limit` is the most rows of a workgroup; fewer give the same bits.
struct DecodeShape {
  std::uint32_t subgroups = 0, subgroup_size = 0;
  std::uint32_t row_limit = 0;  ///< a power of two
  std::uint32_t head_lanes = 0, value_lanes = 0;
  std::uint32_t shared_bytes = 0;  ///< with row_limit rows

  std::uint32_t workgroup() const { return subgroups * subgroup_size; }
  /// Rows of a workgroup for a call with `num_indices` rows of a group.
  std::uint32_t rows(std::int64_t num_indices) const;
  /// Constants 16, 17, ...; `rows` is a power of two, at most row_limit.
  std::vector<std::uint32_t> constants(std::uint32_t rows) const {
    return {subgroups, subgroup_size, rows, head_lanes, value_lanes};
  }
};

/// shaders/merge.comp.
struct MergeShape {
  std::uint32_t rows = 0;   ///< of a workgroup
  std::uint32_t lanes = 0;  ///< threads of a row
  std::uint32_t ahead = 0;  ///< partial states that are loaded together
  std::uint32_t batch = 0;  ///< splits whose factors are found together

  std::uint32_t workgroup() const { return rows * lanes; }
  std::vector<std::uint32_t> constants() const { return {rows, lanes, ahead, batch}; }
};

/// nullopt where a subgroup's registers or shared memory are too few. `size` is of one product;
/// `in_registers` as MatrixTraits::nv2.
std::optional<MatrixShape> matrix_shape(const ShapeQuery& query, std::uint32_t size,
                                        bool in_registers);

/// Each throws std::invalid_argument if even the smallest shape needs more than the device has.
AttendShape attend_shape(const ShapeQuery& query);
DecodeShape decode_shape(const ShapeQuery& query);
/// `many`: splits of a few rows, rather than few splits of many.
MergeShape merge_shape(const ShapeQuery& query, bool many);

}  // namespace keyfold::vulkan

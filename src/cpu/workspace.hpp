// The scratch of a CPU run, laid out once: its size depends on the rows and the threads, never on
// the number of keys.
#pragma once

#include <algorithm>
#include <limits>
#include <new>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"
#include "hwy/aligned_allocator.h"

namespace keyfold::cpu {

inline constexpr std::int64_t kPackedKeys = 4 * kSplitLen;  // packed together for shared rows
inline constexpr std::int64_t kFewRows = 32;   // rows of a group up to which splits are the tasks
inline constexpr std::int64_t kTaskRows = 48;  // rows of one task, before they are aligned
inline constexpr std::int64_t kMaxTaskRows = 64;  // and after
/// Words of a tile's query rows, which pass through L1 for each strip of keys; and rows that each
/// strip should serve in any case.
inline constexpr std::int64_t kQueryWords = 12'288, kLeastRowTile = 32;
inline constexpr std::int64_t kPartialRows = 4096;  // row states that wait to be merged

/// Sizes in floats (32-bit words).
struct Layout {
  Layout(const core::Problem& problem, const Kernels& kernels)
      : words(kernels.words(problem.shape.dtype, problem.shape.head_dim)),
        padded_value_dim((problem.shape.value_dim + 15) / 16 * 16),
        row_tile(std::min(kernels.row_tile, std::max(kLeastRowTile, kQueryWords / words))),
        bias_rows(problem.mask ? score_rows() : 0) {}

  std::int64_t packed_key() const { return words + padded_value_dim; }
  std::int64_t row_state() const { return padded_value_dim + 2; }
  /// Query rows that one thread packs together: a task's, or kFewRows.
  static constexpr std::int64_t query_floats() {
    return std::max(kMaxTaskRows, kFewRows) * kMaxDim;
  }
  /// Rows whose scores one thread holds together: kFewRows, in whole tiles.
  std::int64_t score_rows() const { return (kFewRows + row_tile - 1) / row_tile * row_tile; }
  /// A panel of keys or of values.
  std::int64_t panel() const { return std::max(words, padded_value_dim) * kPanel; }
  std::int64_t thread() const {
    return query_floats() + score_rows() * kScoreStride + bias_rows * kSplitLen + panel() +
           round_up(row_tile * row_state());
  }
  std::int64_t total(std::int64_t rows, int num_threads) const {
    return round_up(rows * row_state()) + round_up(kPartialRows * row_state()) +
           kPackedKeys * packed_key() + num_threads * thread();
  }
  /// Keeps what follows on a cache line of its own.
  static std::int64_t round_up(std::int64_t floats) { return (floats + 15) / 16 * 16; }

  std::int64_t words;
  std::int64_t padded_value_dim;
  std::int64_t row_tile;
  std::int64_t bias_rows;
};

/// `rows` row states, one after another by field.
struct RowStates {
  float* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t padded_dim = 0;

  RowState at(std::int64_t row) const {
    float* const m = data + rows * padded_dim;
    return {data + row * padded_dim, m + row, m + rows + row};
  }
};

/// Keys and values of a split, packed panel by panel.
struct PackedSplit {
  float* k;
  float* v;
};

/// What one thread works in.
struct ThreadSpace {
  float* q;       ///< packed query rows of a task
  float* scores;  ///< [score_rows][kScoreStride]
  float* bias;    ///< [bias_rows][kSplitLen]
  float* panel;   ///< keys or values, packed
  RowStates result;
};

class Workspace {
 public:
  Workspace(const Layout& layout, std::int64_t rows, int num_threads)
      : layout_(layout),
        memory_(hwy::AllocateAligned<float>(
            static_cast<std::size_t>(layout.total(rows, num_threads)))) {
    if (!memory_) throw std::bad_alloc();
    const std::int64_t dim = layout.padded_value_dim, row_state = layout.row_state();
    float* next = memory_.get();
    const auto take = [&next](std::int64_t floats) {
      return std::exchange(next, next + Layout::round_up(floats));
    };
    states_ = {take(rows * row_state), rows, dim};
    partials_ = {take(kPartialRows * row_state), kPartialRows, dim};
    packed_ = take(kPackedKeys * layout.packed_key());
    threads_ = next;
    // o stays as it is until the first merge: nothing reads it where l is 0.
    std::fill_n(states_.data + rows * dim, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(states_.data + rows * (dim + 1), rows, 0.0f);
  }

  const Layout& layout() const { return layout_; }
  const RowStates& states() const { return states_; }
  const RowStates& partials() const { return partials_; }
  /// One of kPackedKeys / slot_keys.
  PackedSplit packed(std::int64_t slot, std::int64_t slot_keys) const {
    float* const k = packed_ + slot * slot_keys * layout_.packed_key();
    return {k, k + slot_keys * layout_.words};
  }
  ThreadSpace thread(std::int64_t index) const {
    float* const q = threads_ + index * layout_.thread();
    float* const scores = q + Layout::query_floats();
    float* const bias = scores + layout_.score_rows() * kScoreStride;
    float* const panel = bias + layout_.bias_rows * kSplitLen;
    float* const result = panel + layout_.panel();
    return {q, scores, bias, panel, {result, layout_.row_tile, layout_.padded_value_dim}};
  }

 private:
  Layout layout_;
  hwy::AlignedFreeUniquePtr<float[]> memory_;
  RowStates states_, partials_;
  float* packed_ = nullptr;
  float* threads_ = nullptr;
};

}  // namespace keyfold::cpu

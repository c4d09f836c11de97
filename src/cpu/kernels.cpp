// The attention kernels: scores, softmax, weighted values, merge. This file is compiled once for
// each instruction set (Google Highway's foreach_target); the choice is made at its foot.
#include "cpu/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "keyfold/error.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h

#include "cpu/pack-inl.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::int64_t kSumLanes = 16;  // chains of a row's sum, whatever the vector width

// Rows x vectors of accumulators that fit the register file with their operands.
#if HWY_TARGET == HWY_SCALAR
constexpr int kRowTile = 2, kVectors = 4;
#elif HWY_TARGET == HWY_AVX2
constexpr int kRowTile = 6, kVectors = 2;
#else
constexpr int kRowTile = 6, kVectors = 4;
#endif
static_assert(kRowTile <= kMaxRowTile);

/// c[r][:] (+)= sum over i of a[r][i] * b[i][:] for kRows rows and kWidth vectors.
template <class Words, int kRows, int kWidth, bool kAccumulate>
HWY_INLINE void product(const typename Words::Word* HWY_RESTRICT a, std::int64_t a_stride,
                        const typename Words::Word* HWY_RESTRICT b, std::int64_t b_stride,
                        std::int64_t count, float* HWY_RESTRICT c, std::int64_t c_stride) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> sum[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) {
      sum[r][w] = kAccumulate ? hn::LoadU(d, c + r * c_stride + w * kLanes) : hn::Zero(d);
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    hn::Vec<decltype(d)> right[kWidth];
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) right[w] = Words::load(d, b + i * b_stride + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto left = Words::broadcast(d, a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) {
        sum[r][w] = Words::multiply_add(left, right[w], sum[r][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) hn::StoreU(sum[r][w], d, c + r * c_stride + w * kLanes);
  }
}

/// Scores of kRows rows against the panels that hold keys [begin, end): c[r][key].
template <class Words, int kRows>
HWY_NOINLINE void score_rows(const Tile& tile, std::int64_t begin, std::int64_t end) {
  using Word = typename Words::Word;
  constexpr auto kStrip =
      static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>())) * kVectors;
  const auto* q = static_cast<const Word*>(tile.q);
  const auto* k = static_cast<const Word*>(tile.k);
  for (std::int64_t key = begin / kStrip * kStrip; key < end; key += kStrip) {
    const Word* panel = k + key / kPanel * kPanel * tile.words + key % kPanel;
    product<Words, kRows, kVectors, false>(q, tile.words, panel, kPanel, tile.words,
                                           tile.scores + key, kSplitLen);
  }
}

/// Outputs of kRows rows: o[r][:] = sum over keys of scores[r][key] * v[key][:].
template <int kRows, int kWidth = kVectors>
HWY_INLINE void weigh_columns(const Tile& tile, std::int64_t begin, std::int64_t end,
                              std::int64_t column, float* o) {
  product<FloatWords, kRows, kWidth, false>(
      tile.scores + begin, kSplitLen, tile.v + begin * tile.padded_value_dim + column,
      tile.padded_value_dim, end - begin, o + column, tile.padded_value_dim);
}

template <int kRows>
HWY_NOINLINE void weigh_rows(const Tile& tile, std::int64_t begin, std::int64_t end, float* o) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  std::int64_t column = 0;
  for (; column + kVectors * kLanes <= tile.padded_value_dim; column += kVectors * kLanes) {
    weigh_columns<kRows>(tile, begin, end, column, o);
  }
  const std::int64_t left = (tile.padded_value_dim - column) / kLanes;
  if (left == 3) weigh_columns<kRows, 3>(tile, begin, end, column, o);
  if (left == 2) weigh_columns<kRows, 2>(tile, begin, end, column, o);
  if (left == 1) weigh_columns<kRows, 1>(tile, begin, end, column, o);
}

/// Turns a row's products into weights exp(score - m), 0 where hidden, over [begin, end) (multiples
/// of kSumLanes); returns m and the sum l.
HWY_NOINLINE void softmax_row(const Tile& tile, std::int64_t row, std::int64_t begin,
                              std::int64_t end, float* m, float* l) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  constexpr std::int64_t kChains = kSumLanes / kLanes;
  const float kHidden = -std::numeric_limits<float>::infinity();
  float* scores = tile.scores + row * kSplitLen;
  const float* bias = tile.bias ? tile.bias + row * kSplitLen : nullptr;
  const V scale = hn::Set(d, tile.scale), hidden = hn::Set(d, kHidden);
  const V cap = hn::Set(d, tile.softcap), to_cap = hn::Set(d, tile.scale / tile.softcap);
  const V first = hn::Set(d, static_cast<float>(tile.begin[row]));
  const V last = hn::Set(d, static_cast<float>(tile.end[row]));
  const V lane = hn::Iota(d, 0.0f);

  V most[kChains];
  for (auto& x : most) x = hidden;
  for (std::int64_t key = begin; key < end; key += kSumLanes) {
    const bool inside = key >= tile.begin[row] && key + kSumLanes <= tile.end[row];
    for (std::int64_t c = 0; c < kChains; ++c) {
      const std::int64_t at = key + c * kLanes;
      V s = hn::LoadU(d, scores + at);
      if (tile.softcap > 0) {
        s = hn::Mul(cap, hn::Tanh(d, hn::Mul(s, to_cap)));
      } else {
        s = hn::Mul(s, scale);
      }
      if (bias) {
        const V b = hn::LoadU(d, bias + at);
        s = hn::IfThenElse(hn::Eq(b, hidden), hidden, hn::Add(s, b));
      }
      if (!inside) {
        const V position = hn::Add(lane, hn::Set(d, static_cast<float>(at)));
        s = hn::IfThenElse(hn::And(hn::Ge(position, first), hn::Lt(position, last)), s, hidden);
      }
      hn::StoreU(s, d, scores + at);
      most[c] = hn::Max(most[c], s);
    }
  }
  for (std::int64_t c = 1; c < kChains; ++c) most[0] = hn::Max(most[0], most[c]);
  *m = hn::GetLane(hn::MaxOfLanes(d, most[0]));
  const V base = hn::Set(d, *m == kHidden ? 0.0f : *m);  // a row that sees nothing: all weights 0

  V sum[kChains];
  for (auto& x : sum) x = hn::Zero(d);
  for (std::int64_t key = begin; key < end; key += kSumLanes) {
    for (std::int64_t c = 0; c < kChains; ++c) {
      const V p = exp_nonpositive(d, hn::Sub(hn::LoadU(d, scores + key + c * kLanes), base));
      hn::StoreU(p, d, scores + key + c * kLanes);
      sum[c] = hn::Add(sum[c], p);
    }
  }
  HWY_ALIGN float chains[kSumLanes];
  for (std::int64_t c = 0; c < kChains; ++c) hn::StoreU(sum[c], d, chains + c * kLanes);
  for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) chains[i] += chains[i + half];
  }
  *l = chains[0];
}

/// A row whose output is not finite, once more: keys of weight 0 (hidden ones among them) are
/// passed over, as 0 times Inf or NaN would leak their values. Same bits where all values are
/// finite.
HWY_NOINLINE void weigh_row_exactly(const Tile& tile, const float* weights, std::int64_t begin,
                                    std::int64_t end, float* o) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  std::fill(o, o + tile.padded_value_dim, 0.0f);
  for (std::int64_t key = begin; key < end; ++key) {
    if (weights[key] == 0) continue;
    const auto weight = hn::Set(d, weights[key]);
    const float* value = tile.v + key * tile.padded_value_dim;
    for (std::int64_t i = 0; i < tile.padded_value_dim; i += kLanes) {
      hn::StoreU(hn::MulAdd(weight, hn::LoadU(d, value + i), hn::LoadU(d, o + i)), d, o + i);
    }
  }
}

HWY_INLINE bool all_finite(const float* o, std::int64_t count) {
  const hn::ScalableTag<float> d;
  auto sum = hn::Zero(d);  // x - x is 0 for finite x, NaN otherwise
  for (std::int64_t i = 0; i < count; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const auto x = hn::LoadU(d, o + i);
    sum = hn::Add(sum, hn::Sub(x, x));
  }
  return hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

template <class Words, int kRows>
void reduce_rows(const Tile& tile, const RowState& result) {
  std::int64_t begin = kSplitLen, end = 0;
  for (int r = 0; r < kRows; ++r) {
    if (tile.begin[r] >= tile.end[r]) continue;
    begin = std::min(begin, tile.begin[r]);
    end = std::max(end, tile.end[r]);
  }
  score_rows<Words, kRows>(tile, begin, end);
  const std::int64_t sum_begin = begin / kSumLanes * kSumLanes;
  const std::int64_t sum_end = (end + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (int r = 0; r < kRows; ++r) {
    softmax_row(tile, r, sum_begin, sum_end, result.m + r, result.l + r);
  }
  weigh_rows<kRows>(tile, begin, end, result.o);
  for (int r = 0; r < kRows; ++r) {
    float* o = result.o + r * tile.padded_value_dim;
    if (!all_finite(o, tile.padded_value_dim)) {
      weigh_row_exactly(tile, tile.scores + r * kSplitLen, begin, end, o);
    }
  }
}

template <class Words, int kRows = kRowTile>
void reduce_words(const Tile& tile, const RowState& result) {
  if (tile.num_rows == kRows) {
    reduce_rows<Words, kRows>(tile, result);
  } else if constexpr (kRows > 1) {
    reduce_words<Words, kRows - 1>(tile, result);
  }
}

void reduce(const Tile& tile, DType dtype, const RowState& result) {
#if KEYFOLD_HAS_BF16_PAIRS
  if (as_pairs(dtype)) return reduce_words<BFloat16Pairs>(tile, result);
#endif
  (void)dtype;
  reduce_words<FloatWords>(tile, result);
}

void merge(const RowState& state, const RowState& later, std::int64_t padded_dim) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> d1;
  const float hidden = -std::numeric_limits<float>::infinity();
  const float m = hn::GetLane(hn::Max(hn::Set(d1, *state.m), hn::Set(d1, *later.m)));
  const float base = m == hidden ? 0.0f : m;
  const float keep = hn::GetLane(exp_nonpositive(d1, hn::Set(d1, *state.m - base)));
  const float add = hn::GetLane(exp_nonpositive(d1, hn::Set(d1, *later.m - base)));
  *state.m = m;
  *state.l = std::fma(*later.l, add, *state.l * keep);
  const auto keep_v = hn::Set(d, keep), add_v = hn::Set(d, add);
  for (std::int64_t i = 0; i < padded_dim; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const auto kept = hn::Mul(hn::LoadU(d, state.o + i), keep_v);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, later.o + i), add_v, kept), d, state.o + i);
  }
}

void exp_array(const float* x, float* result, std::int64_t count) {
  const hn::CappedTag<float, 1> d;
  for (std::int64_t i = 0; i < count; ++i) {
    hn::StoreU(exp_nonpositive(d, hn::LoadU(d, x + i)), d, result + i);
  }
}

Kernels make_kernels(const char* name) {
  return {name, kRowTile, words, pack_q, pack_k, pack_v, reduce, merge, exp_array};
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keyfold::cpu {
namespace {

/// Compiled kernels that this machine can run, best first.
std::vector<Kernels> runnable_kernels() {
  std::vector<Kernels> result;
  const std::int64_t supported = hwy::SupportedTargets();
  (void)supported;
#if HWY_TARGETS & HWY_AVX3_DL
  if ((supported & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512bf16")) {
    result.push_back(N_AVX3_DL::make_kernels("avx512_bf16"));
  }
#endif
#if HWY_TARGETS & HWY_AVX3
  if ((supported & HWY_AVX3) != 0) result.push_back(N_AVX3::make_kernels("avx512"));
#endif
#if HWY_TARGETS & HWY_AVX2
  if ((supported & HWY_AVX2) != 0) result.push_back(N_AVX2::make_kernels("avx2"));
#endif
#if HWY_TARGETS & HWY_NEON
  result.push_back(N_NEON::make_kernels("neon"));
#endif
#if HWY_TARGETS & HWY_SCALAR
  result.push_back(N_SCALAR::make_kernels("portable"));
#endif
  return result;
}

const std::vector<Kernels>& kernels() {
  static const std::vector<Kernels> all = runnable_kernels();
  return all;
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernels& k : kernels()) names.emplace_back(k.name);
  return names;
}

const Kernels& selected_kernels() {
  const char* wanted = std::getenv("KEYFOLD_CPU_ISA");
  if (wanted == nullptr) return kernels().front();
  std::string names;
  for (const Kernels& k : kernels()) {
    if (wanted == std::string(k.name)) return k;
    names += (names.empty() ? "" : ", ") + std::string(k.name);
  }
  throw InvalidArgument("KEYFOLD_CPU_ISA",
                        "expected one of " + names + ", got '" + std::string(wanted) + "'");
}

}  // namespace keyfold::cpu
#endif  // HWY_ONCE

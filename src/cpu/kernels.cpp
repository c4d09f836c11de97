// The attention kernels: scores, softmax, weighted values, merge. This file is compiled once for
// each instruction set (Google Highway's foreach_target); the choice is made at its foot.
#include "cpu/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "cpu/tiles/kernels.hpp"
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
constexpr std::int64_t kTaskTiles = 8;  // row tiles of one task
static_assert(kRowTile <= kMaxRowTile);

/// c[r][:] (+)= sum over i of a[r][i] * b[i][:] for kRows rows and kWidth vectors.
template <class Words, int kRows, int kWidth>
HWY_INLINE void product(const typename Words::Word* HWY_RESTRICT a, std::int64_t a_stride,
                        const typename Words::Word* HWY_RESTRICT b, std::int64_t b_stride,
                        std::int64_t count, bool accumulate, float* HWY_RESTRICT c,
                        std::int64_t c_stride) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> sum[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) {
      sum[r][w] = accumulate ? hn::LoadU(d, c + r * c_stride + w * kLanes) : hn::Zero(d);
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

template <class Words, int kRows>
HWY_NOINLINE void score_rows(const Tile& tile, const typename Words::Word* panels,
                             std::int64_t origin, std::int64_t begin, std::int64_t end) {
  using Word = typename Words::Word;
  constexpr auto kStrip =
      static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>())) * kVectors;
  const auto* q = static_cast<const Word*>(tile.q);
  for (std::int64_t key = begin / kStrip * kStrip; key < end; key += kStrip) {
    const std::int64_t at = key - origin;
    const Word* strip = panels + at / kPanel * kPanel * tile.words + at % kPanel;
    product<Words, kRows, kVectors>(q, tile.words, strip, kPanel, tile.words, false,
                                    tile.scores + key, kSplitLen);
  }
}

/// v points at the values of key `begin`.
template <int kRows>
HWY_NOINLINE void weigh_rows(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                             float* o) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  const std::int64_t dim = tile.padded_value_dim;
  const float* weights = tile.scores + begin;
  const bool accumulate = begin > tile.first;
  std::int64_t column = 0;
  const auto columns = [&]<int kWidth>(std::integral_constant<int, kWidth>) HWY_ATTR {
    product<FloatWords, kRows, kWidth>(weights, kSplitLen, v + column, dim, end - begin, accumulate,
                                       o + column, dim);
    column += kWidth * kLanes;
  };
  while (column + kVectors * kLanes <= dim) columns(std::integral_constant<int, kVectors>());
  const std::int64_t left = (dim - column) / kLanes;
  if (left == 3) columns(std::integral_constant<int, 3>());
  if (left == 2) columns(std::integral_constant<int, 2>());
  if (left == 1) columns(std::integral_constant<int, 1>());
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
  if (*l != *l)
    *m = *l;  // a NaN score, or one of +Inf: the row stays NaN whatever it is merged with
}

void softmax(const Tile& tile, const RowState& result) {
  const std::int64_t begin = tile.first / kSumLanes * kSumLanes;
  const std::int64_t end = (tile.last + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    softmax_row(tile, r, begin, end, result.m + r, result.l + r);
  }
}

void weigh_exactly(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                   const RowState& result) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  const std::int64_t dim = tile.padded_value_dim;
  const std::int64_t first = std::max(begin, tile.first), last = std::min(end, tile.last);
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    float* o = result.o + r * dim;
    if (first == tile.first) std::fill(o, o + dim, 0.0f);
    for (std::int64_t key = first; key < last; ++key) {
      const float weight = tile.scores[r * kSplitLen + key];
      if (weight == 0) continue;
      for (std::int64_t i = 0; i < dim; i += kLanes) {
        const auto value = hn::LoadU(d, v + (key - begin) * dim + i);
        hn::StoreU(hn::MulAdd(hn::Set(d, weight), value, hn::LoadU(d, o + i)), d, o + i);
      }
    }
  }
}

bool all_finite(const Tile& tile, const RowState& result) {
  const hn::ScalableTag<float> d;
  auto sum = hn::Zero(d);  // x - x is 0 for finite x, NaN otherwise
  for (std::int64_t i = 0; i < tile.num_rows * tile.padded_value_dim;
       i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const auto x = hn::LoadU(d, result.o + i);
    sum = hn::Add(sum, hn::Sub(x, x));
  }
  return hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

/// call(std::integral_constant<int, rows>) with rows = num_rows.
template <int kRows = kRowTile, class Call>
HWY_INLINE void with_rows(std::int64_t num_rows, const Call& call) {
  if (num_rows == kRows) {
    call(std::integral_constant<int, kRows>());
  } else if constexpr (kRows > 1) {
    with_rows<kRows - 1>(num_rows, call);
  }
}

template <class Words>
void score_words(const Tile& tile, const void* panels, std::int64_t begin, std::int64_t end) {
  with_rows(tile.num_rows, [&](auto rows) {
    score_rows<Words, rows()>(tile, static_cast<const typename Words::Word*>(panels), begin,
                              std::max(begin, tile.first), std::min(end, tile.last));
  });
}

void score(const Tile& tile, DType dtype, const void* panels, std::int64_t begin,
           std::int64_t end) {
#if KEYFOLD_HAS_BF16_PAIRS
  if (as_pairs(dtype)) return score_words<BFloat16Pairs>(tile, panels, begin, end);
#endif
  (void)dtype;
  score_words<FloatWords>(tile, panels, begin, end);
}

void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  const std::int64_t first = std::max(begin, tile.first), last = std::min(end, tile.last);
  if (first >= last) return;
  with_rows(tile.num_rows, [&](auto rows) {
    weigh_rows<rows()>(tile, v + (first - begin) * tile.padded_value_dim, first, last, result.o);
  });
}

void merge(const RowState& state, const RowState& later, std::int64_t padded_dim) {
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 1> d1;
  const float hidden = -std::numeric_limits<float>::infinity();
  const float m = *state.m > *later.m || *state.m != *state.m ? *state.m : *later.m;
  const float base = m == hidden ? 0.0f : m;
  const float keep = hn::GetLane(exp_nonpositive(d1, hn::Set(d1, *state.m - base)));
  const float add = hn::GetLane(exp_nonpositive(d1, hn::Set(d1, *later.m - base)));
  // A side of weight 0 is left out, as 0 times its Inf or NaN would be NaN. The same bits
  // otherwise.
  if (add == 0) return;
  *state.m = m;
  if (keep == 0) {
    *state.l = *later.l;
    std::copy_n(later.o, padded_dim, state.o);
    return;
  }
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
  return {name,    kRowTile, kTaskTiles * kRowTile, words,      pack_q, pack_k,   pack_v, score,
          softmax, weigh,    weigh_exactly,         all_finite, merge,  exp_array};
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keyfold::cpu {
namespace {

/// One instruction set's kernels for each dtype.
struct KernelSet {
  Kernels float32, float16, bfloat16;

  const Kernels& of(DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? float16 : bfloat16;
  }
};

KernelSet same_for_all(const Kernels& kernels) { return {kernels, kernels, kernels}; }

/// With tiles for float16 and bfloat16, if `on_tiles` has them.
template <class OnTiles>
void add_tiles(std::vector<KernelSet>& sets, Kernels vectors, const char* name, OnTiles on_tiles) {
  const std::optional<Kernels> float16 = on_tiles(vectors, DType::kFloat16, name);
  const std::optional<Kernels> bfloat16 = on_tiles(vectors, DType::kBFloat16, name);
  vectors.name = name;
  if (float16 && bfloat16) sets.push_back({vectors, *float16, *bfloat16});
}

/// Compiled kernels that this machine can run, best first.
std::vector<KernelSet> runnable_kernels() {
  std::vector<KernelSet> result;
  const std::int64_t supported = hwy::SupportedTargets();
  (void)supported;
#if HWY_TARGETS & HWY_AVX3_DL
  if ((supported & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512bf16")) {
    const Kernels vectors = N_AVX3_DL::make_kernels("avx512_bf16");
    add_tiles(result, vectors, "avx512_amx", tiles::amx_kernels);
    result.push_back(same_for_all(vectors));
  }
#endif
#if HWY_TARGETS & HWY_AVX3
  if ((supported & HWY_AVX3) != 0) {
    result.push_back(same_for_all(N_AVX3::make_kernels("avx512")));
  }
#endif
#if HWY_TARGETS & HWY_AVX2
  if ((supported & HWY_AVX2) != 0) {
    result.push_back(same_for_all(N_AVX2::make_kernels("avx2")));
  }
#endif
#if HWY_TARGETS & HWY_NEON
  result.push_back(same_for_all(N_NEON::make_kernels("neon")));
#endif
#if HWY_TARGETS & HWY_SCALAR
  result.push_back(same_for_all(N_SCALAR::make_kernels("portable")));
#endif
  return result;
}

/// What is chosen by name only.
std::vector<KernelSet> kernels_for_tests(const std::vector<KernelSet>& runnable) {
  std::vector<KernelSet> result;
  for (const KernelSet& set : runnable) {
    if (!result.empty() || set.float32.name == std::string("avx512_amx")) continue;
    add_tiles(result, set.float32, "amx_emulated", tiles::emulated_kernels);
  }
  return result;
}

// Both are never destroyed: a thread may still compute while the process exits.
const std::vector<KernelSet>& kernels() {
  static const auto& all = *new std::vector<KernelSet>(runnable_kernels());
  return all;
}

const std::vector<KernelSet>& test_kernels() {
  static const auto& all = *new std::vector<KernelSet>(kernels_for_tests(kernels()));
  return all;
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelSet& set : kernels()) names.emplace_back(set.float32.name);
  return names;
}

const Kernels& selected_kernels(DType dtype) {
  const char* wanted = std::getenv("KEYFOLD_CPU_ISA");
  if (wanted == nullptr) return kernels().front().of(dtype);
  std::string names;
  for (const KernelSet& set : kernels()) {
    if (wanted == std::string(set.float32.name)) return set.of(dtype);
    names += (names.empty() ? "" : ", ") + std::string(set.float32.name);
  }
  for (const KernelSet& set : test_kernels()) {
    if (wanted == std::string(set.float32.name)) return set.of(dtype);
  }
  throw InvalidArgument("KEYFOLD_CPU_ISA",
                        "expected one of " + names + ", got '" + std::string(wanted) + "'");
}

}  // namespace keyfold::cpu
#endif  // HWY_ONCE

// The attention kernels: scores, softmax, weighted values, merge. This file is compiled once for
// each instruction set (Google Highway's foreach_target); the choice is made at its foot.
#include "cpu/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

#include "cpu/tiles/kernels.hpp"
#include "keyfold/error.hpp"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/kernels.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h

#include "cpu/direct-inl.hpp"
#include "cpu/finish-inl.hpp"
#include "cpu/pack-inl.hpp"
#include "cpu/product-inl.hpp"
#include "cpu/softmax-inl.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows x vectors of accumulators that fit the register file with their operands.
#if HWY_TARGET == HWY_SCALAR
constexpr int kRowTile = 2, kVectors = 4;
#elif HWY_TARGET == HWY_AVX2
constexpr int kRowTile = 6, kVectors = 2;
#else
constexpr int kRowTile = 6, kVectors = 4;
#endif
static_assert(kRowTile <= kMaxRowTile);

template <class Words, int kRows>
HWY_NOINLINE void score_panels(const Tile& tile, const typename Words::Word* panels,
                               std::int64_t origin, std::int64_t begin, std::int64_t end) {
  using Word = typename Words::Word;
  constexpr auto kStrip =
      static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>())) * kVectors;
  const auto* q = static_cast<const Word*>(tile.q);
  for (std::int64_t key = begin / kStrip * kStrip; key < end; key += kStrip) {
    const std::int64_t at = key - origin;
    const Word* strip = panels + at / kPanel * kPanel * tile.words + at % kPanel;
    product<Words, Words, kRows, kVectors>(q, tile.words, strip, kPanel, tile.words, false,
                                           tile.scores + key, kSplitLen);
  }
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

template <class Words>
void score_packed(const Tile& tile, const void* panels, std::int64_t begin, std::int64_t end) {
  with_rows<kRowTile>(tile.num_rows, [&](auto rows) HWY_ATTR {
    score_panels<Words, rows()>(tile, static_cast<const typename Words::Word*>(panels), begin,
                                std::max(begin, tile.first), std::min(end, tile.last));
  });
}

template <bool kPairs>
void score(const Tile& tile, DType dtype, const void* panels, std::int64_t begin,
           std::int64_t end) {
#if KEYFOLD_HAS_BF16_PAIRS
  if (as_pairs<kPairs>(dtype)) return score_packed<BFloat16Pairs>(tile, panels, begin, end);
#endif
  (void)dtype;
  score_packed<FloatWords>(tile, panels, begin, end);
}

template <int kRows>
HWY_NOINLINE void weigh_packed(const float* weights, const float* v, std::int64_t count,
                               bool accumulate, float* o, std::int64_t dim) {
  weigh_columns<Float32Values, kRows, kVectors>(weights, kSplitLen, v, dim, count, accumulate, o,
                                                dim, 0, [](std::int64_t, std::int64_t) {});
}

void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  const std::int64_t first = std::max(begin, tile.first), last = std::min(end, tile.last);
  if (first >= last) return;
  const std::int64_t dim = tile.padded_value_dim;
  with_rows<kRowTile>(tile.num_rows, [&](auto rows) HWY_ATTR {
    weigh_packed<rows()>(tile.scores + first, v + (first - begin) * dim, last - first,
                         first > tile.first, result.o, dim);
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

template <bool kPairs = KEYFOLD_HAS_BF16_PAIRS>
Kernels make_kernels(const char* name) {
  return {.name = name,
          .row_tile = kRowTile,
          .words = words<kPairs>,
          .score_rows = score_rows<kPairs>,
          .weigh_rows = weigh_rows,
          .pack_q = pack_q<kPairs>,
          .pack_k = pack_k<kPairs>,
          .pack_v = pack_v,
          .score = score<kPairs>,
          .softmax = softmax,
          .weigh = weigh,
          .weigh_exactly = weigh_exactly,
          .all_finite = all_finite,
          .merge = merge,
          .finish_row = finish_row,
          .exp = exp_array};
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keyfold::cpu {
namespace {

/// One instruction set's kernels: on vectors, and for prefill on tiles, where it has these.
struct KernelSet {
  struct Tiles {
    Kernels float16, bfloat16;
  };

  Kernels vectors;
  std::optional<Tiles> tiles = {};

  const Kernels& of(DType dtype, std::int64_t q_len) const {
    if (!tiles || dtype == DType::kFloat32 || q_len <= kDecodeLen) return vectors;
    return dtype == DType::kFloat16 ? tiles->float16 : tiles->bfloat16;
  }
};

/// Adds the set with tiles, if `on_tiles` has them.
template <class OnTiles>
void add_tiles(std::vector<KernelSet>& sets, Kernels vectors, const char* name, OnTiles on_tiles) {
  const std::optional<Kernels> float16 = on_tiles(vectors, DType::kFloat16, name);
  const std::optional<Kernels> bfloat16 = on_tiles(vectors, DType::kBFloat16, name);
  vectors.name = name;
  if (float16 && bfloat16) sets.push_back({vectors, KernelSet::Tiles{*float16, *bfloat16}});
}

#if HWY_ARCH_ARM_A64
/// Whether the processor multiplies bfloat16 pairs (FEAT_BF16).
bool has_bfdot() {
#if defined(__linux__)
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16, which old headers lack
  return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

/// Compiled kernels that this machine can run, best first.
std::vector<KernelSet> runnable_kernels() {
  std::vector<KernelSet> result;
  const std::int64_t supported = hwy::SupportedTargets();
  (void)supported;
#if HWY_TARGETS & HWY_AVX3_DL
  if ((supported & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512bf16")) {
    const Kernels vectors = N_AVX3_DL::make_kernels("avx512_bf16");
    add_tiles(result, vectors, "avx512_amx", tiles::amx_kernels);
    result.push_back({vectors});
  }
#endif
#if HWY_TARGETS & HWY_AVX3
  if ((supported & HWY_AVX3) != 0) {
    result.push_back({N_AVX3::make_kernels("avx512")});
  }
#endif
#if HWY_TARGETS & HWY_AVX2
  if ((supported & HWY_AVX2) != 0) {
    result.push_back({N_AVX2::make_kernels("avx2")});
  }
#endif
#if HWY_TARGETS & HWY_NEON
#if HWY_ARCH_ARM_A64
  if (has_bfdot()) result.push_back({N_NEON::make_kernels<true>("neon_bf16")});
#endif
  result.push_back({N_NEON::make_kernels<false>("neon")});
#endif
#if HWY_TARGETS & HWY_SCALAR
  result.push_back({N_SCALAR::make_kernels("portable")});
#endif
  return result;
}

/// What is chosen by name only.
std::vector<KernelSet> kernels_for_tests(const std::vector<KernelSet>& runnable) {
  std::vector<KernelSet> result;
  for (const KernelSet& set : runnable) {
    if (!result.empty() || set.vectors.name == std::string("avx512_amx")) continue;
    add_tiles(result, set.vectors, "amx_emulated", tiles::emulated_kernels);
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

const KernelSet& selected_set() {
  const char* wanted = std::getenv("KEYFOLD_CPU_ISA");
  if (wanted == nullptr) return kernels().front();
  std::string names;
  for (const KernelSet& set : kernels()) {
    if (wanted == std::string(set.vectors.name)) return set;
    names += (names.empty() ? "" : ", ") + std::string(set.vectors.name);
  }
  for (const KernelSet& set : test_kernels()) {
    if (wanted == std::string(set.vectors.name)) return set;
  }
  throw InvalidArgument("KEYFOLD_CPU_ISA",
                        "expected one of " + names + ", got '" + std::string(wanted) + "'");
}

}  // namespace

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelSet& set : kernels()) names.emplace_back(set.vectors.name);
  return names;
}

const Kernels& selected_kernels(DType dtype, std::int64_t q_len) {
  return selected_set().of(dtype, q_len);
}

bool decode_as_prefill() { return !selected_set().tiles; }

}  // namespace keyfold::cpu
#endif  // HWY_ONCE

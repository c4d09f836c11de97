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
#include "cpu/mask-inl.hpp"
#include "cpu/pack-inl.hpp"
#include "cpu/product-inl.hpp"
#include "cpu/softmax-inl.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Rows of a tile that are multiplied together, and what they see.
struct Part {
  std::int64_t row, num_rows;
  Panels panels = 0;
  std::int64_t first = kSplitLen, last = 0;  // keys
};

/// A tile in parts of at most kRowTile rows, as alike as can be: small ones wait for their sums.
class Parts {
 public:
  explicit Parts(const Tile& tile) {
    const std::int64_t parts = (tile.num_rows + kRowTile - 1) / kRowTile;
    const std::int64_t rows = (tile.num_rows + parts - 1) / parts;
    for (std::int64_t row = 0; row < tile.num_rows; row += rows) {
      Part& part = parts_[count_++];
      part = {row, std::min(rows, tile.num_rows - row)};
      for (std::int64_t r = row; r < row + part.num_rows; ++r) {
        if (tile.seen[r] == 0) continue;
        part.panels |= tile.seen[r];
        part.first = std::min<std::int64_t>(part.first, tile.begin[r]);
        part.last = std::max<std::int64_t>(part.last, tile.end[r]);
      }
    }
  }
  const Part* begin() const { return parts_; }
  const Part* end() const { return parts_ + count_; }

 private:
  static constexpr std::int64_t kMost = (kMaxRowTile + kRowTile - 1) / kRowTile;
  Part parts_[kMost];
  std::int64_t count_ = 0;
};

template <class Words, int kRows, int kWidth>
HWY_NOINLINE void score_strip_of(const typename Words::Word* q, const typename Words::Word* strip,
                                 std::int64_t words, float* scores) {
  product<Words, Words, kRows, kWidth>(q, kMaxDim, strip, kStrip, words, false, scores,
                                       kScoreStride);
}

/// Strip by strip, which stays in L1 while the tile's rows pass. Of the last one no more than
/// softmax looks at, where that is half.
template <class Words>
void score_packed(const Tile& tile, const void* panels, std::int64_t begin, std::int64_t end) {
  using Word = typename Words::Word;
  constexpr bool kHalves = kStrip > kSumLanes;
  static_assert(!kHalves || kStrip == 2 * kSumLanes);
  const Parts parts(tile);
  for (std::int64_t key = std::max(begin, tile.first / kStrip * kStrip);
       key < std::min(end, tile.last); key += kStrip) {
    const Word* const strip = static_cast<const Word*>(panels) + (key - begin) * tile.words;
    for (const Part& part : parts) {
      if ((part.panels >> key / kPanel & 1) == 0) continue;
      if (key >= part.last || key + kStrip <= part.first) continue;
      with_rows<kRowTile>(part.num_rows, [&](auto rows) HWY_ATTR {
        const auto score = [&](auto width) HWY_ATTR {
          score_strip_of<Words, rows(), width()>(
              static_cast<const Word*>(tile.q) + part.row * kMaxDim, strip, tile.words,
              tile.scores + part.row * kScoreStride + key);
        };
        if (!kHalves || tile.last > key + kSumLanes) {
          return score(std::integral_constant<int, kTileVectors>());
        }
        score(std::integral_constant<int, kTileVectors / (kHalves ? 2 : 1)>());
      });
    }
  }
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

void softmax(const Tile& tile, const RowState& result) {
  const std::int64_t begin = tile.first / kSumLanes * kSumLanes;
  const std::int64_t end = (tile.last + kSumLanes - 1) / kSumLanes * kSumLanes;
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    softmax_row(tile, r, begin, end, tile.scores + r * kScoreStride, result.m + r, result.l + r);
  }
}

/// o (+)= weights times a strip of values, for the keys that `part` sees of `panels`; `values` is
/// the strip of key 0's panel.
template <int kRows, int kWidth>
HWY_NOINLINE void weigh_strip(const Part& part, Panels panels, const float* weights,
                              const float* values, std::int64_t dim, float* o) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  constexpr std::int64_t kColumns = kWidth * kLanes;
  const auto lowest = static_cast<Panels>(panels & -panels);
  hn::Vec<hn::ScalableTag<float>> sum[kRows][kWidth];
  load_sums((part.panels & (lowest - 1)) != 0, o, dim, sum);
  for (; panels != 0; panels &= static_cast<Panels>(panels - 1)) {
    const std::int64_t key = std::countr_zero(panels) * kPanel;
    const std::int64_t first = std::max(part.first - key, std::int64_t{0});
    const std::int64_t last = std::min(part.last - key, kPanel);
    multiply<FloatWords, Float32Values>(weights + key + first, kScoreStride,
                                        values + key * dim + first * kColumns, kColumns,
                                        last - first, sum);
  }
  store_sums(sum, o, dim);
}

/// A strip of values stays in L1 while the tile's rows pass, for as many keys as it then has.
void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  constexpr std::int64_t kKeys = 2 * kPanel;
  constexpr int kLeft = std::max(1, 16 * kTileVectors / static_cast<int>(kStrip));
  const std::int64_t dim = tile.padded_value_dim;
  const Parts parts(tile);
  for (const Part& part : parts) {
    if (part.panels == 0) std::fill_n(result.o + part.row * dim, part.num_rows * dim, 0.0f);
  }
  for (std::int64_t key = begin; key < end; key += kKeys) {
    const Panels here = tile.panels & panels_of(key, std::min(end, key + kKeys));
    for (std::int64_t column = 0; column < dim && here != 0; column += kStrip) {
      for (const Part& part : parts) {
        const Panels panels = part.panels & here;
        if (panels == 0) continue;
        const float* const values = v - begin * dim + column * kPanel;
        with_rows<kRowTile>(part.num_rows, [&](auto rows) HWY_ATTR {
          const auto strip = [&](auto width) HWY_ATTR {
            weigh_strip<rows(), width()>(part, panels, tile.scores + part.row * kScoreStride,
                                         values, dim, result.o + part.row * dim + column);
          };
          if (column + kStrip <= dim) return strip(std::integral_constant<int, kTileVectors>());
          strip(std::integral_constant<int, kLeft>());
        });
      }
    }
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
    if (begin <= tile.first) std::fill(o, o + dim, 0.0f);
    for (std::int64_t key = first; key < last; ++key) {
      if ((tile.seen[r] >> key / kPanel & 1) == 0) continue;
      const float weight = tile.scores[r * kScoreStride + key];
      if (weight == 0) continue;
      const float* const panel = v + (key / kPanel * kPanel - begin) * dim;
      for (std::int64_t i = 0; i < dim; i += kLanes) {
        const auto value = hn::LoadU(d, panel + ValueStrip(i, dim).at(key % kPanel, i));
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

/// What merging rows takes: the larger maximum, and the weights of state and later.
struct MergeFactors {
  float m[16], keep[16], add[16];
};

/// Those of as many rows as d has lanes.
template <class D>
HWY_INLINE void merge_factors(D d, const float* state_m, const float* later_m,
                              MergeFactors* factors, std::int64_t at) {
  const auto state = hn::LoadU(d, state_m), later = hn::LoadU(d, later_m);
  const auto hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  const auto larger = hn::Or(hn::Gt(state, later), hn::Ne(state, state));
  const auto m = hn::IfThenElse(larger, state, later);
  const auto base = hn::IfThenElse(hn::Eq(m, hidden), hn::Zero(d), m);
  hn::StoreU(m, d, factors->m + at);
  hn::StoreU(exp_nonpositive(d, hn::Sub(state, base)), d, factors->keep + at);
  hn::StoreU(exp_nonpositive(d, hn::Sub(later, base)), d, factors->add + at);
}

void merge(const RowState& states, const RowState& laters, std::int64_t padded_dim,
           std::int64_t rows) {
  const hn::CappedTag<float, 16> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  MergeFactors factors;
  for (std::int64_t first = 0; first < rows; first += kLanes) {
    const std::int64_t here = std::min(kLanes, rows - first);
    if (here == kLanes) {
      merge_factors(d, states.m + first, laters.m + first, &factors, 0);
    } else {
      for (std::int64_t i = 0; i < here; ++i) {
        merge_factors(hn::CappedTag<float, 1>(), states.m + first + i, laters.m + first + i,
                      &factors, i);
      }
    }
    for (std::int64_t i = 0; i < here; ++i) {
      const std::int64_t row = first + i;
      float* const o = states.o + row * padded_dim;
      const float* const later_o = laters.o + row * padded_dim;
      const float keep = factors.keep[i], add = factors.add[i];
      // A side of weight 0 is left out, as 0 times its Inf or NaN would be NaN. The same bits
      // otherwise.
      if (add == 0) continue;
      states.m[row] = factors.m[i];
      if (keep == 0) {
        states.l[row] = laters.l[row];
        std::copy_n(later_o, padded_dim, o);
        continue;
      }
      states.l[row] = std::fma(laters.l[row], add, states.l[row] * keep);
      const auto keep_v = hn::Set(d, keep), add_v = hn::Set(d, add);
      for (std::int64_t c = 0; c < padded_dim; c += kLanes) {
        const auto kept = hn::Mul(hn::LoadU(d, o + c), keep_v);
        hn::StoreU(hn::MulAdd(hn::LoadU(d, later_o + c), add_v, kept), d, o + c);
      }
    }
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
          .row_tile = kMaxRowTile,
          .row_align = 1,
          .words = words<kPairs>,
          .score_rows = score_rows<kPairs>,
          .weigh_rows = weigh_rows,
          .gather_bias = gather_bias,
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

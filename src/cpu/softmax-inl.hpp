// From a row's products to its weights. Compiled per instruction set.
#if defined(KEYFOLD_CPU_SOFTMAX_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_SOFTMAX_INL_HPP
#undef KEYFOLD_CPU_SOFTMAX_INL_HPP
#else
#define KEYFOLD_CPU_SOFTMAX_INL_HPP
#endif

#include <limits>

#include "cpu/kernels.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::int64_t kSumLanes = 16;  // chains of a row's sum, whatever the vector width

/// A row's products with keys [begin, end), multiples of kSumLanes, become scores: scaled, capped,
/// biased, hidden.
template <class D>
HWY_INLINE void finish_scores(D d, const Tile& tile, std::int64_t row, bool biased,
                              std::int64_t begin, std::int64_t end, float* scores) {
  using V = hn::Vec<D>;
  const V scale = hn::Set(d, tile.scale);
  const V hidden = hn::Set(d, -std::numeric_limits<float>::infinity());
  const V cap = hn::Set(d, tile.softcap), to_cap = hn::Set(d, tile.scale / tile.softcap);
  const V first = hn::Set(d, static_cast<float>(tile.begin[row]));
  const V last = hn::Set(d, static_cast<float>(tile.end[row]));
  const V lane = hn::Iota(d, 0.0f);
  const bool inside = begin >= tile.begin[row] && end <= tile.end[row];
  for (std::int64_t at = begin; at < end; at += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    V s = hn::LoadU(d, scores + at);
    if (tile.softcap > 0) {
      s = hn::Mul(cap, hn::Tanh(d, hn::Mul(s, to_cap)));
    } else {
      s = hn::Mul(s, scale);
    }
    if (biased) {
      const V b = hn::LoadU(d, tile.bias[row] + at);
      s = hn::IfThenElse(hn::Eq(b, hidden), hidden, hn::Add(s, b));
    }
    if (!inside) {
      const V position = hn::Add(lane, hn::Set(d, static_cast<float>(at)));
      s = hn::IfThenElse(hn::And(hn::Ge(position, first), hn::Lt(position, last)), s, hidden);
    }
    hn::StoreU(s, d, scores + at);
  }
}

/// Turns a row's products, `scores`, into weights exp(score - m), 0 where hidden, over what of the
/// tile's panels is in [begin, end) (multiples of kSumLanes); returns m and the sum l.
HWY_NOINLINE inline void softmax_row(const Tile& tile, std::int64_t row, std::int64_t begin,
                                     std::int64_t end, float* scores, float* m, float* l) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<decltype(d)>;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  constexpr std::int64_t kChains = kSumLanes / kLanes;
  constexpr std::int64_t kAbreast = std::max<std::int64_t>(4, kChains);  // vectors
  const float kHidden = -std::numeric_limits<float>::infinity();
  const V scale = hn::Set(d, tile.scale), hidden = hn::Set(d, kHidden);
  const auto each_panel = [&](const auto& call) HWY_ATTR {
    for (unsigned left = tile.panels; left != 0; left &= left - 1) {
      const std::int64_t key = std::countr_zero(left) * kPanel;
      call(std::max(begin, key), std::min(end, key + kPanel), left & -left);
    }
  };
  // Panels of which the row sees all keys, with nothing done to their scores, stay products.
  const Panels within = panels_of(tile.begin[row] + kPanel - 1, tile.end[row] - kPanel + 1);
  const unsigned plain =
      tile.softcap > 0 ? 0 : within & tile.seen[row] & ~unsigned{tile.biased[row]};

  V most[kAbreast];
  for (auto& x : most) x = hidden;
  each_panel([&](std::int64_t first, std::int64_t last, unsigned panel) HWY_ATTR {
    if ((tile.seen[row] & panel) == 0) return;
    if ((plain & panel) == 0) {
      finish_scores(d, tile, row, (tile.biased[row] & panel) != 0, first, last, scores);
    }
    const V factor = (plain & panel) != 0 ? scale : hn::Set(d, 1.0f);
    for (std::int64_t key = first; key < last; key += kAbreast * kLanes) {
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kAbreast; ++i) {
        if (key + i * kLanes >= last) break;
        most[i] = hn::Max(most[i], hn::Mul(hn::LoadU(d, scores + key + i * kLanes), factor));
      }
    }
  });
  for (std::int64_t i = 1; i < kAbreast; ++i) most[0] = hn::Max(most[0], most[i]);
  *m = hn::GetLane(hn::MaxOfLanes(d, most[0]));
  const V base = hn::Set(d, *m == kHidden ? 0.0f : *m);  // a row that sees nothing: all weights 0

  V sum[kChains];
  for (auto& x : sum) x = hn::Zero(d);
  each_panel([&](std::int64_t first, std::int64_t last, unsigned panel) HWY_ATTR {
    if ((tile.seen[row] & panel) == 0) {
      std::fill(scores + first, scores + last, 0.0f);
      return;
    }
    const V factor = (plain & panel) != 0 ? scale : hn::Set(d, 1.0f);
    const auto weights = [&](auto count, float* at) HWY_ATTR {
      constexpr int kCount = decltype(count)::value;
      V p[kCount];
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        p[i] = hn::Sub(hn::Mul(hn::LoadU(d, at + i * kLanes), factor), base);
      }
      exp_nonpositive(d, p);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        hn::StoreU(p[i], d, at + i * kLanes);
        sum[i % kChains] = hn::Add(sum[i % kChains], p[i]);
      }
    };
    std::int64_t key = first;
    for (; key + kAbreast * kLanes <= last; key += kAbreast * kLanes) {
      weights(std::integral_constant<int, kAbreast>(), scores + key);
    }
    for (; key < last; key += kSumLanes) {
      weights(std::integral_constant<int, kChains>(), scores + key);
    }
  });
  HWY_ALIGN float chains[kSumLanes];
  for (std::int64_t c = 0; c < kChains; ++c) hn::StoreU(sum[c], d, chains + c * kLanes);
  for (std::int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) chains[i] += chains[i + half];
  }
  *l = chains[0];
  if (*l != *l)
    *m = *l;  // a NaN score, or one of +Inf: the row stays NaN whatever it is merged with
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

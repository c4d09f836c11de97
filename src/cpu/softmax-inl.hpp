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

/// Turns a row's products into weights exp(score - m), 0 where hidden, over [begin, end) (multiples
/// of kSumLanes); returns m and the sum l.
HWY_NOINLINE inline void softmax_row(const Tile& tile, std::int64_t row, std::int64_t begin,
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

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// From transposed scores to weights as pairs of keys. Compiled per instruction set.
#if defined(KEYFOLD_CPU_TILES_SOFTMAX_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_TILES_SOFTMAX_INL_HPP
#undef KEYFOLD_CPU_TILES_SOFTMAX_INL_HPP
#else
#define KEYFOLD_CPU_TILES_SOFTMAX_INL_HPP
#endif

#include <limits>

#include "cpu/tiles/products-inl.hpp"
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {

/// 2^x for x <= 0: the polynomial of exp_nonpositive, its coefficients times powers of ln2. Adding
/// 1.5 * 2^23 rounds x to an integer, which then stands in the lowest bits. Results below the
/// normal range are 0. NaN whose payload is in its upper 16 bits gives NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp2_nonpositive(D d, V x) {
  const hn::RebindToUnsigned<D> du;
  const V shift = hn::Set(d, 0x1.8p+23f);
  const V shifted = hn::Add(x, shift);
  const V r = hn::Sub(x, hn::Sub(shifted, shift));
  V p = hn::Set(d, 0x1.43e722p-13f);
  p = hn::MulAdd(p, r, hn::Set(d, 0x1.5ec876p-10f));
  p = hn::MulAdd(p, r, hn::Set(d, 0x1.3b2a8p-7f));
  p = hn::MulAdd(p, r, hn::Set(d, 0x1.c6afecp-5f));
  p = hn::MulAdd(p, r, hn::Set(d, 0x1.ebfbep-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 0x1.62e43p-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const auto scaled = hn::Add(hn::BitCast(du, p), hn::ShiftLeft<23>(hn::BitCast(du, shifted)));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), hn::BitCast(d, scaled));
}

/// The softmax of some rows of a tile, one to a vector lane.
class LaneSoftmax {
 public:
  /// Rows from `row` on, as many as there are lanes.
  LaneSoftmax(const Tile& tile, std::int64_t row)
      : tile_(tile),
        row_(row),
        scores_(tile.scores + row / kLanes * kRowBlockWords + row % kLanes),
        begin_(tile.first / kStep * kStep),
        end_((tile.last + kStep - 1) / kStep * kStep),
        scaled_later_(tile.bias == nullptr && !(tile.softcap > 0) && tile.scale > 0) {}

  /// Scores become weights; writes m and l of the rows that the tile has.
  void run(const RowState& result) {
    const hn::CappedTag<float, kLanes> d;
    const V hidden = hn::Set(d, kHidden);
    const V top = largest();
    const V base = hn::IfThenElse(hn::Eq(top, hidden), hn::Zero(d), top);  // all hidden: weights 0
    const float scale = scaled_later_ ? tile_.scale : 1.0f;
    const V sum = weigh_keys(base, hn::Set(d, scale * 0x1.715476p+0f));
    V m = hn::Mul(top, hn::Set(d, scale));
    m = hn::IfThenElse(hn::Eq(sum, sum), m, sum);  // a NaN score, or one of +Inf: the row stays NaN
    HWY_ALIGN float ms[kLanes], sums[kLanes];
    hn::StoreU(m, d, ms);
    hn::StoreU(sum, d, sums);
    const std::int64_t rows =
        std::min(static_cast<std::int64_t>(hn::MaxLanes(d)), tile_.num_rows - row_);
    std::copy_n(ms, rows, result.m + row_);
    std::copy_n(sums, rows, result.l + row_);
  }

 private:
  using D = hn::CappedTag<float, kLanes>;
  using V = hn::Vec<D>;
  static constexpr float kHidden = -std::numeric_limits<float>::infinity();

  /// Hides keys, adds the bias; the largest score, before the scale where that comes later.
  V largest() {
    const D d;
    V most[4];
    for (auto& x : most) x = hn::Set(d, kHidden);
    std::int64_t inner_begin = 0, inner_end = scaled_later_ ? end_ : 0;  // seen by all rows
    const std::int64_t rows =
        std::min(static_cast<std::int64_t>(hn::MaxLanes(d)), tile_.num_rows - row_);
    for (std::int64_t r = row_; r < row_ + rows; ++r) {
      inner_begin = std::max(inner_begin, (tile_.begin[r] + 3) / 4 * 4);
      inner_end = std::min(inner_end, tile_.end[r] / 4 * 4);
    }
    for (std::int64_t key = begin_; key < end_; key += 4) {
      const bool inner = key >= inner_begin && key < inner_end;
      for (std::int64_t i = 0; i < 4; ++i) {
        float* const at = scores_ + (key + i) * kLanes;
        V s = hn::LoadU(d, at);
        if (!inner) {
          s = finished(s, key + i);
          hn::StoreU(s, d, at);
        }
        most[i] = hn::Max(most[i], s);
      }
    }
    return hn::Max(hn::Max(most[0], most[1]), hn::Max(most[2], most[3]));
  }

  HWY_NOINLINE V finished(V s, std::int64_t key) const {
    const D d;
    const hn::RebindToSigned<D> di;
    const V hidden = hn::Set(d, kHidden);
    if (!scaled_later_) {
      if (tile_.softcap > 0) {
        s = hn::Mul(s, hn::Set(d, tile_.scale / tile_.softcap));
        s = hn::Mul(hn::Set(d, tile_.softcap), hn::Tanh(d, s));
      } else {
        s = hn::Mul(s, hn::Set(d, tile_.scale));
      }
      if (tile_.bias) {
        const auto row = hn::Mul(hn::Iota(di, 0), hn::Set(di, static_cast<int>(kSplitLen)));
        const V bias = hn::GatherIndex(d, tile_.bias + row_ * kSplitLen + key, row);
        s = hn::IfThenElse(hn::Eq(bias, hidden), hidden, hn::Add(s, bias));
      }
      s = hn::IfThenElse(hn::Eq(s, s), s, hn::Set(d, std::numeric_limits<float>::quiet_NaN()));
    }
    HWY_ALIGN float first[kLanes], last[kLanes];
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(hn::MaxLanes(d)); ++i) {
      first[i] = static_cast<float>(tile_.begin[row_ + i]);
      last[i] = static_cast<float>(tile_.end[row_ + i]);
    }
    const V position = hn::Set(d, static_cast<float>(key));
    const auto seen =
        hn::And(hn::Ge(position, hn::Load(d, first)), hn::Lt(position, hn::Load(d, last)));
    return hn::IfThenElse(seen, s, hidden);
  }

  /// Writes weights; returns their sums: 8 chains, by key modulo 8, added by a fixed tree.
  V weigh_keys(V base, V to_power) {
    const D d;
    V sum[8];
    for (auto& x : sum) x = hn::Zero(d);
    for (std::int64_t key = begin_; key < end_; key += 8) {
#pragma GCC unroll 4
      for (std::int64_t i = 0; i < 8; i += 2) {
        float* const even = scores_ + (key + i) * kLanes;
        float* const odd = even + kLanes;
        const auto weight = [&](const float* score) HWY_ATTR {
          return exp2_nonpositive(d, hn::Mul(hn::Sub(hn::LoadU(d, score), base), to_power));
        };
        const V p = weight(even), next = weight(odd);
        sum[i] = hn::Add(sum[i], p);
        sum[i + 1] = hn::Add(sum[i + 1], next);
        store_pairs(p, next, even, odd);
      }
    }
    for (std::int64_t half = 4; half > 0; half /= 2) {
      for (std::int64_t i = 0; i < half; ++i) sum[i] = hn::Add(sum[i], sum[i + half]);
    }
    return sum[0];
  }

  /// The weights of two keys as bfloat16 pairs: rounded high parts, and what these leave, cut off.
  static HWY_INLINE void store_pairs(V even, V odd, float* high, float* low) {
    const D d;
    const hn::RebindToUnsigned<D> du;
    const auto half = hn::Set(du, 0x8000), upper = hn::Set(du, 0xffff0000);
    const auto rounded = [&](V p)
                             HWY_ATTR { return hn::And(hn::Add(hn::BitCast(du, p), half), upper); };
    const auto even_high = rounded(even), odd_high = rounded(odd);
    const auto even_low = hn::BitCast(du, hn::Sub(even, hn::BitCast(d, even_high)));
    const auto odd_low = hn::BitCast(du, hn::Sub(odd, hn::BitCast(d, odd_high)));
    hn::StoreU(hn::Or(hn::ShiftRight<16>(even_high), odd_high), du,
               reinterpret_cast<std::uint32_t*>(high));
    hn::StoreU(hn::Or(hn::ShiftRight<16>(even_low), hn::And(odd_low, upper)), du,
               reinterpret_cast<std::uint32_t*>(low));
  }

  const Tile& tile_;
  const std::int64_t row_;
  float* const scores_;
  const std::int64_t begin_, end_;
  const bool scaled_later_;
};

inline void softmax(const Tile& tile, const RowState& result) {
  constexpr auto kRows = static_cast<std::int64_t>(hn::MaxLanes(hn::CappedTag<float, kLanes>()));
  for (std::int64_t row = 0; row < tile.num_rows; row += kRows) LaneSoftmax(tile, row).run(result);
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

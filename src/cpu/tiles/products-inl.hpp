// Scores and outputs by tile products. Compiled per instruction set, for a unit of tiles.
//
// Each sum is one accumulator: for a score over the steps of head_dim, for an output over every 32
// keys, and within these over the products of parts in a fixed order. Four of them are summed side
// by side, so that none waits for the one before.
#if defined(KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#undef KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#else
#define KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#endif

#include <bit>
#include <utility>

#include "cpu/softmax-inl.hpp"
#include "cpu/tiles/pack-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {

constexpr int kSums = 4;                // tiles 0 to 3
constexpr int kFirst = 4, kSecond = 6;  // tiles of first and second operands, two each
constexpr std::int64_t kScoreRowBytes = kScoreStride * static_cast<std::int64_t>(sizeof(float));
constexpr std::int64_t kQueryRowBytes = kMaxDim * static_cast<std::int64_t>(sizeof(float));
static_assert(kPanel == kSums * kLanes);

/// Tiles are configured while this lives: sums and first operands with `rows` rows.
template <class Unit>
struct Session {
  explicit Session(std::int64_t rows) { Unit::configure(rows); }
  ~Session() { Unit::release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

/// call(std::integral_constant<int, i>) for i from 0 to kCount - 1.
template <int kCount, class Call>
HWY_INLINE void each(const Call& call) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (call(std::integral_constant<int, i>()), ...); }
  (std::make_integer_sequence<int, kCount>());
}

/// Keys [begin, end) of a tile, rounded out to whole steps.
struct Steps {
  Steps(const Tile& tile, std::int64_t step, std::int64_t begin, std::int64_t end)
      : first(std::max(begin, tile.first / step * step)),
        last(std::min(end, (tile.last + step - 1) / step * step)) {}
  std::int64_t first, last;
};

/// Whether any row sees a key of the panel of `key`.
HWY_INLINE bool sees(const Tile& tile, std::int64_t key) {
  return (tile.panels >> key / kPanel & 1) != 0;
}

/// Sums += one first operand times kCount second ones, `step` words apart.
template <class Unit, int kCount>
HWY_INLINE void multiply(const void* first, std::int64_t first_row_bytes,
                         const std::uint32_t* second, std::int64_t step) {
  Unit::template load<kFirst>(first, first_row_bytes);
  each<kCount>([&](auto i) {
    constexpr int kTile = kSecond + i() % 2;
    Unit::template load<kTile>(second + i() * step, kTileRowBytes);
    Unit::template dot<i(), kFirst, kTile>();
  });
}

/// call(word of k, word of q) for the products that a score is the sum of, in their order.
template <int kParts, class Call>
HWY_INLINE void each_product(std::int64_t words, const Call& call) {
  const std::int64_t part_words = words / kParts;
  for (std::int64_t w = 0; w < part_words; w += kLanes) {
    for (int k = 0; k < kParts; ++k) {
      for (int q = 0; q < kParts; ++q) call(k * part_words + w, q * part_words + w);
    }
  }
}

/// Whether the tile's scores with keys [key, key + kPanel) are neither Inf nor NaN.
inline bool scores_are_finite(const Tile& tile, std::int64_t key) {
  const hn::CappedTag<float, kLanes> d;
  auto sum = hn::Zero(d);  // 0 * x is 0 for finite x, NaN otherwise
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    const float* const scores = tile.scores + r * kScoreStride + key;
    for (std::int64_t i = 0; i < kPanel; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
      sum = hn::MulAdd(hn::LoadU(d, scores + i), hn::Zero(d), sum);
    }
  }
  return hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

/// A score is Inf or NaN where q or k holds one; split into parts, an Inf meets parts that are 0
/// and gives NaN. Such scores with keys [key, key + kPanel) are computed from the sums of the
/// parts; NaN that is right stays.
template <int kParts>
void repair_scores(const Tile& tile, std::int64_t key, const std::uint32_t* panel) {
  const auto half_of = [](std::uint32_t pair, int half) {
    return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000);
  };
  const std::int64_t part_words = tile.words / kParts;
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    const auto* q = static_cast<const std::uint32_t*>(tile.q) + r * kMaxDim;
    for (std::int64_t i = 0; i < kPanel; ++i) {
      float& score = tile.scores[r * kScoreStride + key + i];
      if (score == score) continue;
      const std::uint32_t* const k = panel + i / kLanes * kLanes * tile.words + i % kLanes;
      score = 0;
      for (std::int64_t w = 0; w < part_words; ++w) {
        for (int half = 0; half < 2; ++half) {
          float a = 0, b = 0;
          for (int part = 0; part < kParts; ++part) {
            a += half_of(k[(part * part_words + w) * kLanes], half);
            b += half_of(q[part * part_words + w], half);
          }
          score += a * b;
        }
      }
    }
  }
}

template <class Unit, int kParts>
void score(const Tile& tile, DType, const void* panels, std::int64_t begin, std::int64_t end) {
  const Steps keys(tile, kPanel, begin, end);
  if (keys.first >= keys.last) return;
  const Session<Unit> session(tile.num_rows);
  const auto* q = static_cast<const std::uint32_t*>(tile.q);
  for (std::int64_t key = keys.first; key < keys.last; key += kPanel) {
    if (!sees(tile, key)) continue;
    const auto* panel = static_cast<const std::uint32_t*>(panels) + (key - begin) * tile.words;
    each<kSums>([](auto i) { Unit::template zero<i()>(); });
    each_product<kParts>(tile.words, [&](std::int64_t of_k, std::int64_t of_q) {
      multiply<Unit, kSums>(q + of_q, kQueryRowBytes, panel + of_k * kLanes, tile.words * kLanes);
    });
    each<kSums>([&](auto i) {
      Unit::template store<i()>(tile.scores + key + i() * kLanes, kScoreRowBytes);
    });
    if (kParts > 1 && !scores_are_finite(tile, key)) repair_scores<kParts>(tile, key, panel);
  }
}

/// Weights as pairs of bfloat16, in place: of every 32, the rounded high parts of i and i + 16,
/// then what these leave, cut off.
inline void pair_weights(const Tile& tile, float* weights, std::int64_t begin, std::int64_t end) {
  const hn::CappedTag<float, kLanes> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const auto split = [&](const float* p) HWY_ATTR -> Halves<decltype(d)> {
    const auto x = hn::LoadU(d, p);
    const auto high =
        hn::And(hn::Add(hn::BitCast(du, x), hn::Set(du, 0x8000)), hn::Set(du, 0xffff0000));
    return {high, hn::BitCast(du, hn::Sub(x, hn::BitCast(d, high)))};
  };
  for (std::int64_t key = begin; key < end; key += kStep) {
    if (!sees(tile, key)) continue;
    for (std::int64_t i = 0; i < kLanes; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
      float* const first = weights + key + i;
      float* const second = first + kLanes;
      const auto a = split(first), b = split(second);
      hn::StoreU(hn::BitCast(d, pair(du, a.high, b.high)), d, first);
      hn::StoreU(hn::BitCast(d, pair(du, a.low, b.low)), d, second);
    }
  }
}

inline void softmax(const Tile& tile, const RowState& result) {
  const Steps keys(tile, kStep, 0, kSplitLen);
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    base::softmax_row(tile, r, keys.first, keys.last, result.m + r, result.l + r);
    pair_weights(tile, tile.scores + r * kScoreStride, keys.first, keys.last);
  }
}

/// Where the values of key `key` are in panels that start with key 0.
template <int kParts>
inline const std::uint32_t* values_at(const void* v, std::int64_t key, std::int64_t dim) {
  return static_cast<const std::uint32_t*>(v) + key / kPanel * kPanel * dim +
         key % kPanel / kStep * step_words<kParts>(dim);
}

/// kCount sums += the weights at `weights` (high parts, then low ones) times values of 32 keys; for
/// an Inf or NaN among these, `finite` has 0.
template <class Unit, int kParts, int kCount>
HWY_INLINE void weigh_step(const float* weights, const std::uint32_t* values,
                           const std::uint32_t* finite, std::int64_t part_words) {
  multiply<Unit, kCount>(weights, kScoreRowBytes, values, kTileWords);
  multiply<Unit, kCount>(weights + kLanes, kScoreRowBytes, finite, kTileWords);
  if (kParts > 1) {
    multiply<Unit, kCount>(weights, kScoreRowBytes, values + part_words, kTileWords);
  }
}

template <class Unit, int kParts>
void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  const Steps keys(tile, kStep, begin, end);
  if (keys.first >= keys.last) return;
  const Session<Unit> session(tile.num_rows);
  const std::int64_t dim = tile.padded_value_dim;
  std::int64_t column = 0;
  const auto columns = [&]<int kCount>() {
    for (; column + kCount * kLanes <= dim; column += kCount * kLanes) {
      float* const o = result.o + column;
      each<kCount>([&](auto i) {
        if (keys.first <= tile.first) return Unit::template zero<i()>();
        Unit::template load<i()>(o + i() * kLanes, 4 * dim);
      });
      for (std::int64_t key = keys.first; key < keys.last; key += kStep) {
        if (!sees(tile, key)) continue;
        const std::uint32_t* values = values_at<kParts>(v, key - begin, dim) + column * kLanes;
        weigh_step<Unit, kParts, kCount>(tile.scores + key, values, values, kLanes * dim);
      }
      each<kCount>([&](auto i) { Unit::template store<i()>(o + i() * kLanes, 4 * dim); });
    }
  };
  columns.template operator()<kSums>();
  columns.template operator()<1>();
}

/// The same products in the same order, but for each row by itself, and with 0 for the values of
/// its keys of weight 0. An Inf or NaN of its other keys meets the high part of the weight only, as
/// the low one may be 0.
template <class Unit, int kParts>
void weigh_exactly(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                   const RowState& result) {
  const Steps keys(tile, kStep, begin, end);
  if (keys.first >= keys.last) return;
  const Session<Unit> session(1);
  const std::int64_t dim = tile.padded_value_dim;
  HWY_ALIGN std::uint32_t values[kParts * kTileWords], finite[kTileWords];
  for (std::int64_t i = 0; i < tile.num_rows * dim; i += kLanes) {
    const std::int64_t row = i / dim, column = i % dim;
    const float* const weights = tile.scores + row * kScoreStride;
    if (keys.first <= tile.first) {
      Unit::template zero<0>();
    } else {
      Unit::template load<0>(result.o + i, kTileRowBytes);
    }
    for (std::int64_t key = keys.first; key < keys.last; key += kStep) {
      if (!sees(tile, key)) continue;
      const std::uint32_t* from = values_at<kParts>(v, key - begin, dim) + column * kLanes;
      for (std::int64_t w = 0; w < kTileWords; ++w) {
        const auto pair = std::bit_cast<std::uint32_t>(weights[key + w / kLanes]);
        const std::uint32_t seen =
            ((pair & 0xffff) != 0 ? 0xffffU : 0) | (pair > 0xffff ? 0xffff0000 : 0);
        const auto number = [&](std::uint32_t half) {
          return (from[w] & half & 0x7f807f80) != (half & 0x7f807f80) ? half : 0;
        };
        values[w] = from[w] & seen;
        finite[w] = values[w] & (number(0xffff) | number(0xffff0000));
        if (kParts > 1) values[kTileWords + w] = from[kLanes * dim + w] & seen;
      }
      weigh_step<Unit, kParts, 1>(weights + key, values, finite, kTileWords);
    }
    Unit::template store<0>(result.o + i, kTileRowBytes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

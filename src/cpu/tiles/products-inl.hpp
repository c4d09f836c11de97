// Scores and outputs by tile products. Compiled per instruction set, for a unit of tiles.
//
// Each sum is one accumulator: for a score over the steps of head_dim, for an output over every 32
// keys, and within these over the products of parts in a fixed order. Two tiles of rows by two of
// keys or columns are summed side by side: none waits for the one before, and each operand that is
// loaded is used twice.
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

constexpr std::int64_t kScoreRowBytes = kScoreStride * static_cast<std::int64_t>(sizeof(float));
constexpr std::int64_t kQueryRowBytes = kMaxDim * static_cast<std::int64_t>(sizeof(float));
static_assert(kPanel % kStep == 0);

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

/// call with the number of row tiles that `rows` rows take: 1 or 2.
template <class Call>
HWY_INLINE void with_row_tiles(std::int64_t rows, const Call& call) {
  if (rows > kTileRows) return call(std::integral_constant<int, 2>());
  call(std::integral_constant<int, 1>());
}

/// kRows x kColumns sums of tiles, row by row.
template <class Unit, int kRows, int kColumns>
struct Sums {
  /// call(tile, row tile, column tile) for each, as integral constants.
  template <class Call>
  static HWY_INLINE void each(const Call& call) {
    tiles::HWY_NAMESPACE::each<kRows>([&](auto r) {
      tiles::HWY_NAMESPACE::each<kColumns>(
          [&](auto c) { call(std::integral_constant<int, kSums + 2 * r() + c()>(), r(), c()); });
    });
  }
  static HWY_INLINE void zero() {
    each([](auto tile, int, int) { Unit::template zero<tile()>(); });
  }
  /// From or to p, whose rows are `row_bytes` apart.
  static HWY_INLINE void load(const float* p, std::int64_t row_bytes) {
    each([&](auto tile, int r, int c) {
      Unit::template load<tile()>(
          reinterpret_cast<const std::byte*>(p + c * kLanes) + r * kTileRows * row_bytes,
          row_bytes);
    });
  }
  static HWY_INLINE void store(float* p, std::int64_t row_bytes) {
    each([&](auto tile, int r, int c) {
      Unit::template store<tile()>(
          reinterpret_cast<std::byte*>(p + c * kLanes) + r * kTileRows * row_bytes, row_bytes);
    });
  }
  /// Loads second operands, `step` words apart.
  static HWY_INLINE void load_second(const std::uint32_t* second, std::int64_t step) {
    tiles::HWY_NAMESPACE::each<kColumns>(
        [&](auto c) { Unit::template load<kSecond + c()>(second + c() * step, kTileRowBytes); });
  }
  /// += first operands, whose rows are `row_bytes` apart, times the second ones.
  static HWY_INLINE void multiply(const void* first, std::int64_t row_bytes) {
    tiles::HWY_NAMESPACE::each<kRows>([&](auto r) {
      Unit::template load<kFirst + r()>(
          static_cast<const std::byte*>(first) + r() * kTileRows * row_bytes, row_bytes);
      tiles::HWY_NAMESPACE::each<kColumns>([&](auto c) {
        Unit::template dot<kSums + 2 * r() + c(), kFirst + r(), kSecond + c()>();
      });
    });
  }
};

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

/// call(word of k, word of q, whether k's is a new one) for the products that a score is the sum
/// of, in their order.
template <int kParts, class Call>
HWY_INLINE void each_product(std::int64_t words, const Call& call) {
  const std::int64_t part_words = words / kParts;
  for (std::int64_t w = 0; w < part_words; w += kLanes) {
    for (int k = 0; k < kParts; ++k) {
      for (int q = 0; q < kParts; ++q) call(k * part_words + w, q * part_words + w, q == 0);
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
  const Steps keys(tile, kStep, begin, end);
  if (keys.first >= keys.last) return;
  const Session<Unit> session(tile.num_rows);
  const auto* q = static_cast<const std::uint32_t*>(tile.q);
  with_row_tiles(tile.num_rows, [&](auto rows) {
    using Block = Sums<Unit, rows(), 2>;
    for (std::int64_t key = keys.first; key < keys.last; key += kStep) {
      if (!sees(tile, key)) continue;
      const auto* k = static_cast<const std::uint32_t*>(panels) + (key - begin) * tile.words;
      Block::zero();
      each_product<kParts>(tile.words, [&](std::int64_t of_k, std::int64_t of_q, bool is_new) {
        if (is_new) Block::load_second(k + of_k * kLanes, tile.words * kLanes);
        Block::multiply(q + of_q, kQueryRowBytes);
      });
      Block::store(tile.scores + key, kScoreRowBytes);
    }
  });
  if constexpr (kParts > 1) {
    for (std::int64_t key = keys.first / kPanel * kPanel; key < keys.last; key += kPanel) {
      if (!sees(tile, key) || scores_are_finite(tile, key)) continue;
      const auto* panel = static_cast<const std::uint32_t*>(panels) + (key - begin) * tile.words;
      repair_scores<kParts>(tile, key, panel);
    }
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
    float* const scores = tile.scores + r * kScoreStride;
    base::softmax_row(tile, r, keys.first, keys.last, scores, result.m + r, result.l + r);
    pair_weights(tile, scores, keys.first, keys.last);
  }
}

/// Where the values of key `key` are in panels that start with key 0.
template <int kParts>
inline const std::uint32_t* values_at(const void* v, std::int64_t key, std::int64_t dim) {
  return static_cast<const std::uint32_t*>(v) + key / kPanel * kPanel * dim +
         key % kPanel / kStep * step_words<kParts>(dim);
}

/// Sums += the weights at `weights` (high parts, then low ones) times values of 32 keys; for an Inf
/// or NaN among these, `finite` has 0.
template <class Block, int kParts>
HWY_INLINE void weigh_step(const float* weights, const std::uint32_t* values,
                           const std::uint32_t* finite, std::int64_t part_words) {
  Block::load_second(values, kTileWords);
  Block::multiply(weights, kScoreRowBytes);
  if (finite != values) Block::load_second(finite, kTileWords);
  Block::multiply(weights + kLanes, kScoreRowBytes);
  if (kParts > 1) {
    Block::load_second(values + part_words, kTileWords);
    Block::multiply(weights, kScoreRowBytes);
  }
}

template <class Unit, int kParts>
void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  const Steps keys(tile, kStep, begin, end);
  if (keys.first >= keys.last) return;
  const Session<Unit> session(tile.num_rows);
  const std::int64_t dim = tile.padded_value_dim;
  with_row_tiles(tile.num_rows, [&](auto rows) {
    const auto columns = [&](auto count, std::int64_t column) {
      using Block = Sums<Unit, rows(), count()>;
      float* const o = result.o + column;
      if (begin <= tile.first) {
        Block::zero();
      } else {
        Block::load(o, 4 * dim);
      }
      for (std::int64_t key = keys.first; key < keys.last; key += kStep) {
        if (!sees(tile, key)) continue;
        const std::uint32_t* values = values_at<kParts>(v, key - begin, dim) + column * kLanes;
        weigh_step<Block, kParts>(tile.scores + key, values, values, kLanes * dim);
      }
      Block::store(o, 4 * dim);
    };
    std::int64_t column = 0;
    for (; column + 2 * kLanes <= dim; column += 2 * kLanes) {
      columns(std::integral_constant<int, 2>(), column);
    }
    if (column < dim) columns(std::integral_constant<int, 1>(), column);
  });
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
    if (begin <= tile.first) {
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
      weigh_step<Sums<Unit, 1, 1>, kParts>(weights + key, values, finite, kTileWords);
    }
    Unit::template store<0>(result.o + i, kTileRowBytes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// Scores and outputs by tile products. Compiled per instruction set, for a unit of tiles.
//
// Each sum is one accumulator: for a score over the steps of head_dim, for an output over every 32
// keys, and within these over the products of parts in a fixed order. How many accumulators stand
// side by side changes nothing. Tiles 0 to 3 are the accumulators, 4 and 5 the first operands, 6
// and 7 the second ones.
#if defined(KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#undef KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#else
#define KEYFOLD_CPU_TILES_PRODUCTS_INL_HPP
#endif

#include <utility>

#include "cpu/tiles/pack-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {

constexpr int kFirst = 4, kSecond = 6;                       // tiles of operands
constexpr std::int64_t kRowBlockWords = kLanes * kSplitLen;  // of scores and weights

/// Tiles are configured while this lives.
template <class Unit>
struct Session {
  Session() { Unit::configure(); }
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

/// Accumulators += first operands times second ones; what lies at `first` and `second` is loaded,
/// block after block, `step` words apart.
template <class Unit, int kFirsts, int kSeconds>
HWY_INLINE void multiply(const std::uint32_t* first, std::int64_t first_step,
                         const std::uint32_t* second, std::int64_t second_step,
                         std::int64_t second_row_bytes) {
  each<kSeconds>([&](auto s) {
    Unit::template load<kSecond + s()>(second + s() * second_step, second_row_bytes);
  });
  each<kFirsts>([&](auto f) {
    constexpr int kTile = kFirst + f() % 2;
    Unit::template load<kTile>(first + f() * first_step, kTileRowBytes);
    each<kSeconds>(
        [&](auto s) { Unit::template dot<f() * kSeconds + s(), kTile, kSecond + s()>(); });
  });
}

/// A score is Inf or NaN where q or k holds one; split into parts, an Inf meets parts that are 0
/// and gives NaN. Such scores of `num_rows` rows (of one block) with 16 keys are computed from the
/// sums of the parts; NaN that is right stays.
template <int kParts>
void repair_scores(const std::uint32_t* k, const std::uint32_t* q, std::int64_t part_words,
                   std::int64_t num_rows, float* scores) {
  const auto value = [](std::uint32_t pair, int half) {
    return std::bit_cast<float>(half == 0 ? pair << 16 : pair & 0xffff0000);
  };
  for (std::int64_t i = 0; i < kLanes * num_rows; ++i) {
    const std::int64_t key = i / num_rows, row = i % num_rows;
    float& score = scores[key * kLanes + row];
    if (score == score) continue;
    score = 0;
    for (std::int64_t w = 0; w < part_words; ++w) {
      for (int half = 0; half < 2; ++half) {
        float a = 0, b = 0;
        for (int part = 0; part < kParts; ++part) {
          const std::int64_t at = part * part_words + w;
          a += value(k[at / kLanes * kTileWords + key * kLanes + at % kLanes], half);
          b += value(q[at * kLanes + row], half);
        }
        score += a * b;
      }
    }
  }
}

inline bool any_nan(const float* scores) {
  const hn::CappedTag<float, kLanes> d;
  auto sum = hn::Zero(d);
  for (std::int64_t i = 0; i < kLanes * kLanes; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const auto s = hn::LoadU(d, scores + i);
    sum = hn::Add(sum, hn::Mul(s, hn::Zero(d)));  // NaN from NaN, and from Inf as well
  }
  return !hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
}

/// Scores of kKeyBlocks x 16 keys with kRowBlocks x 16 rows, as [row block][key][row].
template <class Unit, int kParts, int kKeyBlocks, int kRowBlocks>
HWY_INLINE void score_block(const Tile& tile, const std::uint32_t* k, const std::uint32_t* q,
                            float* scores) {
  const std::int64_t k_step = tile.words * kLanes, q_step = tile.words * kLanes;
  const std::int64_t part_words = tile.words / kParts;
  each<kKeyBlocks * kRowBlocks>([](auto i) { Unit::template zero<i()>(); });
  for (std::int64_t w = 0; w < part_words; w += kLanes) {
    for (int part = 0; part < kParts; ++part) {
      for (int other = 0; other < kParts; ++other) {
        multiply<Unit, kKeyBlocks, kRowBlocks>(k + (part * part_words + w) * kLanes, k_step,
                                               q + (other * part_words + w) * kLanes, q_step,
                                               kTileRowBytes);
      }
    }
  }
  each<kKeyBlocks * kRowBlocks>([&](auto i) {
    constexpr int kKeys = i() / kRowBlocks, kRows = i() % kRowBlocks;
    float* const to = scores + kRows * kRowBlockWords + kKeys * kTileWords;
    Unit::template store<i()>(to, kTileRowBytes);
    if (kParts > 1 && any_nan(to)) {
      repair_scores<kParts>(k + kKeys * k_step, q + kRows * q_step, part_words,
                            std::min(kLanes, tile.num_rows - kRows * kLanes), to);
    }
  });
}

template <class Unit, int kParts>
void score(const Tile& tile, DType, const void* panels, std::int64_t begin, std::int64_t end) {
  const Session<Unit> session;
  const auto* q = static_cast<const std::uint32_t*>(tile.q);
  const std::int64_t first = std::max(begin, tile.first), last = std::min(end, tile.last);
  const auto blocks = [&]<int kKeyBlocks, int kRowBlocks>() {
    constexpr std::int64_t kKeys = kKeyBlocks * kLanes;
    for (std::int64_t key = first / kKeys * kKeys; key < last; key += kKeys) {
      const auto* k = static_cast<const std::uint32_t*>(panels) + (key - begin) * tile.words;
      score_block<Unit, kParts, kKeyBlocks, kRowBlocks>(tile, k, q, tile.scores + key * kLanes);
    }
  };
  if (tile.num_rows > kLanes) {
    blocks.template operator()<2, 2>();
  } else {
    blocks.template operator()<4, 1>();
  }
}

/// Where the values of keys [key, key + 32) are in the panels from key `begin` on.
template <int kParts>
inline const std::uint32_t* values_at(const std::uint32_t* v, std::int64_t begin, std::int64_t key,
                                      std::int64_t dim) {
  return v + (key - begin) / kPanel * kPanel * dim + key % kPanel / kStep * kParts * kLanes * dim;
}

/// Outputs of columns from `column` on, 16 x kColumnBlocks of them, for kRowBlocks x 16 rows, over
/// keys [first, last), multiples of 32. v holds the keys from `begin` on.
template <class Unit, int kParts, int kColumnBlocks, int kRowBlocks>
HWY_INLINE void weigh_block(const Tile& tile, const std::uint32_t* v, std::int64_t begin,
                            std::int64_t first, std::int64_t last, bool accumulate,
                            std::int64_t column, float* o) {
  const std::int64_t dim = tile.padded_value_dim, part_words = dim * kLanes;
  HWY_ALIGN float columns[kTileWords];  // one tile as [column][row]
  const auto o_of = [&](std::int64_t row_block, std::int64_t column_block) {
    return o + row_block * kLanes * dim + column + column_block * kLanes;
  };
  const auto rows_of = [&](std::int64_t row_block) {
    return std::min(kLanes, tile.num_rows - row_block * kLanes);
  };
  each<kColumnBlocks * kRowBlocks>([&](auto i) {
    constexpr int kColumn = i() / kRowBlocks, kRow = i() % kRowBlocks;
    if (!accumulate) return Unit::template zero<i()>();
    for (std::int64_t r = 0; r < rows_of(kRow); ++r) {
      for (std::int64_t c = 0; c < kLanes; ++c) {
        columns[c * kLanes + r] = o_of(kRow, kColumn)[r * dim + c];
      }
    }
    Unit::template load<i()>(columns, kTileRowBytes);
  });
  const auto* weights = reinterpret_cast<const std::uint32_t*>(tile.scores);
  for (std::int64_t key = first; key < last; key += kStep) {
    const std::uint32_t* values = values_at<kParts>(v, begin, key, dim) + column * kLanes;
    const std::uint32_t* high = weights + key * kLanes;
    const std::uint32_t* low = high + kLanes;
    const auto add = [&](const std::uint32_t* value, const std::uint32_t* weight) {
      multiply<Unit, kColumnBlocks, kRowBlocks>(value, kTileWords, weight, kRowBlockWords,
                                                2 * kTileRowBytes);
    };
    add(values, high);
    add(values, low);
    if (kParts > 1) add(values + part_words, high);
  }
  each<kColumnBlocks * kRowBlocks>([&](auto i) {
    constexpr int kColumn = i() / kRowBlocks, kRow = i() % kRowBlocks;
    Unit::template store<i()>(columns, kTileRowBytes);
    base::transpose_rows(reinterpret_cast<const std::byte*>(columns), kTileRowBytes, rows_of(kRow),
                         reinterpret_cast<std::uint32_t*>(o_of(kRow, kColumn)), dim);
  });
}

template <class Unit, int kParts>
void weigh(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
           const RowState& result) {
  const std::int64_t first = std::max(begin, tile.first / kStep * kStep);
  const std::int64_t last = std::min(end, (tile.last + kStep - 1) / kStep * kStep);
  if (first >= last) return;
  const Session<Unit> session;
  std::int64_t column = 0;
  const auto columns = [&]<int kColumnBlocks, int kRowBlocks>() {
    for (; column + kColumnBlocks * kLanes <= tile.padded_value_dim;
         column += kColumnBlocks * kLanes) {
      weigh_block<Unit, kParts, kColumnBlocks, kRowBlocks>(
          tile, reinterpret_cast<const std::uint32_t*>(v), begin, first, last, first > tile.first,
          column, result.o);
    }
  };
  if (tile.num_rows > kLanes) {
    columns.template operator()<2, 2>();
    columns.template operator()<1, 2>();
  } else {
    columns.template operator()<4, 1>();
    columns.template operator()<1, 1>();
  }
}

/// The same products in the same order, but for each row by itself, and with 0 for the values of
/// its keys of weight 0. An Inf or NaN of its other keys meets the high part of the weight only, as
/// the low one may be 0.
template <class Unit, int kParts>
void weigh_exactly(const Tile& tile, const float* v, std::int64_t begin, std::int64_t end,
                   const RowState& result) {
  const std::int64_t first = std::max(begin, tile.first / kStep * kStep);
  const std::int64_t last = std::min(end, (tile.last + kStep - 1) / kStep * kStep);
  if (first >= last) return;
  const Session<Unit> session;
  const std::int64_t dim = tile.padded_value_dim, part_words = dim * kLanes;
  HWY_ALIGN std::uint32_t values[kTileWords], numbers[kTileWords];
  HWY_ALIGN float columns[kTileWords];
  for (std::int64_t i = 0; i < tile.num_rows * dim / kLanes; ++i) {
    const std::int64_t row = i / (dim / kLanes), column = i % (dim / kLanes) * kLanes;
    const std::int64_t lane = row % kLanes;
    float* const o = result.o + row * dim + column;
    std::fill_n(columns, kTileWords, 0.0f);
    for (std::int64_t c = 0; c < kLanes && first > tile.first; ++c)
      columns[c * kLanes + lane] = o[c];
    Unit::template load<0>(columns, kTileRowBytes);
    for (std::int64_t key = first; key < last; key += kStep) {
      const auto* high = reinterpret_cast<const std::uint32_t*>(tile.scores) +
                         row / kLanes * kRowBlockWords + key * kLanes;
      for (int part = 0; part < kParts; ++part) {
        const auto* from =
            values_at<kParts>(reinterpret_cast<const std::uint32_t*>(v), begin, key, dim) +
            part * part_words + column * kLanes;
        for (std::int64_t w = 0; w < kTileWords; ++w) {
          const std::uint32_t weights = high[w % kLanes * 2 * kLanes + lane];
          values[w] = numbers[w] = 0;
          for (const std::uint32_t half : {0x0000ffffU, 0xffff0000U}) {
            if ((weights & half) == 0) continue;
            values[w] |= from[w] & half;
            if ((from[w] & half & 0x7f807f80) != (half & 0x7f807f80)) numbers[w] |= from[w] & half;
          }
        }
        multiply<Unit, 1, 1>(values, 0, high, 0, 2 * kTileRowBytes);
        if (part == 0) multiply<Unit, 1, 1>(numbers, 0, high + kLanes, 0, 2 * kTileRowBytes);
      }
    }
    Unit::template store<0>(columns, kTileRowBytes);
    for (std::int64_t c = 0; c < kLanes; ++c) o[c] = columns[c * kLanes + lane];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// Scores and weighted values straight from the rows of k and v, for few query rows: each row is
// read once and nothing of it is written. Compiled per instruction set.
//
// Keys are transposed in registers just before they are multiplied. A row is taken as 32-bit words;
// a word is one step of a score's chain (float32, bfloat16 pairs) or two (16-bit elements).
#if defined(KEYFOLD_CPU_DIRECT_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_DIRECT_INL_HPP
#undef KEYFOLD_CPU_DIRECT_INL_HPP
#else
#define KEYFOLD_CPU_DIRECT_INL_HPP
#endif

#include <algorithm>
#include <utility>

#include "cpu/kernels.hpp"
#include "cpu/pack-inl.hpp"
#include "cpu/product-inl.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

constexpr int kRegisters = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SCALAR ? 16 : 32;
constexpr std::int64_t kGatherRows = 32;  // keys whose rows are copied together where they must be
constexpr std::int64_t kValueKeys = 16;   // keys whose values stay in L1 while columns are passed
constexpr std::int64_t kBytesAhead = 8192;  // of the rows that are asked for early
constexpr std::int64_t kLine = 64;          // bytes of a cache line

/// Vectors of columns whose sums of `rows` rows fit the registers, beside one row of them and one
/// number: 1, 2, 4 or 8, at most `most`.
constexpr int vectors_of_sums(int rows, int most) {
  int vectors = 1;
  while (2 * vectors <= most && (rows + 1) * 2 * vectors + 1 <= kRegisters) vectors *= 2;
  return vectors;
}

/// Vectors of keys that are multiplied together: at most 32 keys, so that a cache line of each row
/// stays in L1 until it has been used.
constexpr int score_vectors(int rows) {
  constexpr auto kLanes = static_cast<int>(hn::MaxLanes(hn::ScalableTag<float>()));
  return vectors_of_sums(rows, std::min(4, static_cast<int>(kGatherRows) / kLanes));
}

/// How keys of a dtype get into registers: four vectors at a time, transposed, from kBytes of each
/// row. Each of them is kSteps steps of a score's chain.
struct Float32Keys {
  using Products = FloatWords;
  static constexpr int kSteps = 1;
  static constexpr std::int64_t kBytes = 16;
  template <class D, class V>
  static HWY_INLINE void load(D, const std::byte* rows, std::int64_t stride, V (&columns)[4]) {
    load_columns(hn::RebindToUnsigned<D>(), rows, stride, columns);
  }
  template <int kStep, class D, class V>
  static HWY_INLINE hn::Vec<D> step(D d, V column) {
    return hn::BitCast(d, column);
  }
};

/// Words of two elements are transposed, and parted then.
struct BFloat16Keys : Float32Keys {
  static constexpr int kSteps = 2;
  template <int kStep, class D, class V>
  static HWY_INLINE hn::Vec<D> step(D d, V column) {
    const hn::RebindToUnsigned<D> du;
    if constexpr (kStep == 0) return hn::BitCast(d, hn::ShiftLeft<16>(column));
    return hn::BitCast(d, hn::And(column, hn::Set(du, 0xffff0000u)));
  }
};

/// Widened as they are loaded, as parting words would take more shuffles.
struct Float16Keys : Float32Keys {
  static constexpr std::int64_t kBytes = 8;
  template <class D, class V>
  static HWY_INLINE void load(D d, const std::byte* rows, std::int64_t stride, V (&columns)[4]) {
    const hn::RebindToUnsigned<D> du;
#if HWY_TARGET == HWY_SCALAR
    (void)stride;
    for (int i = 0; i < 4; ++i) {
      columns[i] = hn::BitCast(du, hn::Set(d, core::load_float(rows + 2 * i, DType::kFloat16)));
    }
#else
    V blocks[4];
    for (int i = 0; i < 4; ++i) {
      const hn::Rebind<hwy::float16_t, D> dh;
      const hn::Rebind<std::uint16_t, D> d16;
      blocks[i] = hn::BitCast(
          du, hn::PromoteTo(d, hn::BitCast(dh, load_blocks(d16, rows + i * stride, 4 * stride))));
    }
    transpose_blocks(du, blocks, columns);
#endif
  }
};

#if KEYFOLD_HAS_BF16_PAIRS
struct PairKeys : Float32Keys {
  using Products = BFloat16Pairs;
};
#endif

/// call with the dtype's Keys.
template <bool kPairs, class Call>
HWY_INLINE void with_keys(DType dtype, const Call& call) {
  if (dtype == DType::kFloat32) return call(Float32Keys());
  if (dtype == DType::kFloat16) return call(Float16Keys());
#if KEYFOLD_HAS_BF16_PAIRS
  return call(std::conditional_t<kPairs, PairKeys, BFloat16Keys>());
#else
  return call(BFloat16Keys());
#endif
}

/// Keeps the compiler from what costs registers: having one for every multiple of a stride that is
/// added to p, and keeping what was read through p until it is read again.
template <class T>
HWY_INLINE const T* opaque(const T* p) {
  asm("" : "+r"(p));
  return p;
}

/// Asks for rows that are read later, in the order in which they lie: the processor's own prefetch
/// follows such an order, but stops at page ends and at the columns in which rows are read here.
/// Into L2, as far more lines can be on their way there than to L1, and a few at a time.
class Ahead {
 public:
  HWY_INLINE Ahead(const std::byte* rows, std::int64_t row_bytes, std::int64_t stride)
      : row_(rows), row_bytes_(row_bytes), stride_(stride) {}
  HWY_INLINE void ask(std::int64_t lines) {
    for (; lines > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kLine;
      if (at_ >= row_bytes_) at_ = 0, row_ += stride_;
    }
  }

 private:
  const std::byte* row_;
  std::int64_t row_bytes_, stride_, at_ = 0;
};

/// Transposes one block of kVectors vectors of keys: columns[c][v] is column c of vector v.
template <class Keys, int kVectors>
HWY_INLINE void load_block(const std::byte* k, std::int64_t stride, std::uint32_t* columns) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    hn::Vec<decltype(du)> column[4];
    Keys::load(d, opaque(k + v * kLanes * stride), stride, column);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) hn::Store(column[c], du, columns + (c * kVectors + v) * kLanes);
  }
}

/// sum[r][v] goes on by `count` steps, at most those of a block, of its chain.
template <class Keys, int kRows, int kVectors, class V>
HWY_INLINE void score_block(const typename Keys::Products::Word* q, const std::uint32_t* columns,
                            std::int64_t count, V (&sum)[kRows][kVectors]) {
  using Products = typename Keys::Products;
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  const auto step = [&]<int kStep>(std::integral_constant<int, kStep>, int c) HWY_ATTR {
    const int at = c * Keys::kSteps + kStep;
    if (at >= count) return;
    V key[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      key[v] = Keys::template step<kStep>(d, hn::Load(du, columns + (c * kVectors + v) * kLanes));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V query = Products::broadcast(d, q[r * kMaxDim + at]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Products::multiply_add(query, key[v], sum[r][v]);
      }
    }
  };
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    step(std::integral_constant<int, 0>(), c);
    if constexpr (Keys::kSteps == 2) step(std::integral_constant<int, 1>(), c);
  }
}

/// Scores of kRows query rows and kVectors vectors of keys; q's rows are kMaxDim words apart.
template <class Keys, int kRows, int kVectors>
HWY_INLINE void score_strip(const typename Keys::Products::Word* q, std::int64_t steps,
                            const std::byte* k, std::int64_t stride, std::int64_t ahead,
                            float* scores) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  constexpr std::int64_t kBlock = 4 * Keys::kSteps;
  hn::Vec<decltype(d)> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
  }
  // A block is transposed before the one in front of it is multiplied, into memory: chains of
  // multiply-adds that wait would keep the processor from looking further ahead.
  HWY_ALIGN std::uint32_t blocks[2][4 * kLanes * kVectors];
  const std::uint32_t* now = opaque(blocks[0]);
  std::uint32_t* later = blocks[1];
  Ahead next(k + ahead, steps / Keys::kSteps * (Keys::kBytes / 4), stride);
  constexpr std::int64_t kLines = kVectors * kLanes * Keys::kBytes / kLine;  // of a block
  next.ask(kLines);
  load_block<Keys, kVectors>(k, stride, blocks[0]);
  std::int64_t i = 0, byte = Keys::kBytes;
  for (; i + kBlock < steps; i += kBlock, byte += Keys::kBytes) {
    next.ask(kLines);
    load_block<Keys, kVectors>(k + byte, stride, later);
    score_block<Keys>(q + i, now, kBlock, sum);
    later = const_cast<std::uint32_t*>(std::exchange(now, opaque(later)));
  }
  score_block<Keys>(q + i, now, steps - i, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      hn::StoreU(sum[r][v], d, scores + r * kScoreStride + v * kLanes);
    }
  }
}

/// Scores of `count` keys, a multiple of kGatherRows.
template <class Keys, int kRows>
HWY_NOINLINE void score_rows_at(const typename Keys::Products::Word* q, std::int64_t steps,
                                const std::byte* k, std::int64_t stride, std::int64_t rows_ahead,
                                std::int64_t count, float* scores) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  constexpr int kWidth = score_vectors(kRows);
  constexpr std::int64_t kKeys = kWidth * kLanes;
  static_assert(kGatherRows % kKeys == 0);
  const std::int64_t ahead = std::max(rows_ahead, kKeys) * stride;
  for (std::int64_t i = 0; i < count; i += kKeys) {
    score_strip<Keys, kRows, kWidth>(q, steps, k + i * stride, stride, ahead, scores + i);
  }
}

/// Rows that are asked for while a row is read.
inline std::int64_t rows_ahead(const RowSource& rows) {
  return kBytesAhead / std::max<std::int64_t>(1, rows.dim * size_of(rows.dtype)) + 1;
}

template <class Keys>
void score_keys(const Tile& tile, const RowSource& k, std::int64_t begin, std::int64_t end) {
  using Word = typename Keys::Products::Word;
  const std::int64_t first = std::max(begin, tile.first / kGatherRows * kGatherRows);
  const std::int64_t last =
      std::min(end, (tile.last + kGatherRows - 1) / kGatherRows * kGatherRows);
  if (first >= last) return;
  const auto* const q = static_cast<const Word*>(tile.q);
  const auto score = [&](const std::byte* rows, std::int64_t stride, std::int64_t ahead,
                         std::int64_t count, std::int64_t key) HWY_ATTR {
    with_rows<kDirectRows>(tile.num_rows, [&](auto num_rows) HWY_ATTR {
      score_rows_at<Keys, num_rows()>(q, tile.words, rows, stride, ahead, count, tile.scores + key);
    });
  };
  std::int64_t key = first;
  // Rows are read where they lie if that takes whole blocks, and if their lines do not all want the
  // same few sets of L1, as rows do that are a power of two apart.
  if (k.dim_stride == size_of(k.dtype) && k.dim * size_of(k.dtype) % Keys::kBytes == 0 &&
      k.row_stride % 2048 != 0) {
    const std::int64_t count = (last - first) / kGatherRows * kGatherRows;
    score(k.data + (first - begin) * k.row_stride, k.row_stride, rows_ahead(k), count, first);
    key += count;
  }
  HWY_ALIGN std::uint32_t gathered[kGatherRows * kMaxDim];
  const std::int64_t row_words = (k.dim * size_of(k.dtype) + 15) / 16 * 4;
  for (; key < last; key += kGatherRows) {
    for (std::int64_t i = 0; i < kGatherRows; ++i) {
      std::uint32_t* row = gathered + i * row_words;
      const std::byte* from = k.data + (key - begin + i) * k.row_stride;
      if (key + i >= last) {
        std::fill_n(row, row_words, 0u);
        continue;
      }
      prefetch_ahead(from, k);
      if (k.dtype == DType::kFloat32) {
        widen_row(from, k, row_words, reinterpret_cast<float*>(row));
      } else {
        pair_row(from, k, row_words, row);
      }
    }
    score(reinterpret_cast<const std::byte*>(gathered), 4 * row_words, 0, kGatherRows, key);
  }
}

/// As Kernels::score_rows says.
template <bool kPairs>
void score_rows(const Tile& tile, const RowSource& k, std::int64_t begin, std::int64_t end) {
  with_keys<kPairs>(k.dtype,
                    [&](auto keys) HWY_ATTR { score_keys<decltype(keys)>(tile, k, begin, end); });
}

/// o (+)= weights of keys [begin, end) times their values, `v` that of key `begin`.
template <class Values, int kRows>
HWY_NOINLINE void weigh_rows_at(const Tile& tile, const typename Values::Word* v,
                                std::int64_t stride, std::int64_t rows_ahead, std::int64_t begin,
                                std::int64_t end, float* o) {
  constexpr int kWidth = vectors_of_sums(kRows, 8);
  constexpr std::int64_t kBytes = sizeof(typename Values::Word);
  const std::int64_t dim = tile.padded_value_dim;
  const std::int64_t ahead = std::max(rows_ahead, kValueKeys) * stride;
  for (std::int64_t key = begin; key < end; key += kValueKeys) {
    const std::int64_t count = std::min(kValueKeys, end - key);
    const auto* rows = v + (key - begin) * stride;
    Ahead next(reinterpret_cast<const std::byte*>(rows + ahead), dim * kBytes, stride * kBytes);
    const auto prefetch = [&](std::int64_t, std::int64_t columns)
                              HWY_ATTR { next.ask(kValueKeys * columns * kBytes / kLine); };
    weigh_columns<Values, kRows, kWidth>(tile.scores + key, kScoreStride, rows, stride, count,
                                         key > tile.first, o, dim, 0, prefetch);
  }
}

template <class Values>
HWY_INLINE void weigh_values(const Tile& tile, const void* v, std::int64_t stride,
                             std::int64_t rows_ahead, std::int64_t begin, std::int64_t end,
                             float* o) {
  using Word = typename Values::Word;
  with_rows<kDirectRows>(tile.num_rows, [&](auto num_rows) HWY_ATTR {
    weigh_rows_at<Values, num_rows()>(tile, static_cast<const Word*>(v),
                                      stride / static_cast<std::int64_t>(sizeof(Word)), rows_ahead,
                                      begin, end, o);
  });
}

/// As Kernels::weigh_rows says.
inline void weigh_rows(const Tile& tile, const RowSource& v, std::int64_t begin, std::int64_t end,
                       const RowState& result) {
  const std::int64_t first = std::max(begin, tile.first), last = std::min(end, tile.last);
  if (first >= last) return;
  const std::byte* rows = v.data + (first - begin) * v.row_stride;
  if (v.dim_stride == size_of(v.dtype) && v.dim == tile.padded_value_dim) {
    const auto weigh = [&](auto values) HWY_ATTR {
      weigh_values<decltype(values)>(tile, rows, v.row_stride, rows_ahead(v), first, last,
                                     result.o);
    };
    if (v.dtype == DType::kFloat32) return weigh(Float32Values());
    if (v.dtype == DType::kFloat16) return weigh(Float16Values());
    return weigh(BFloat16Values());
  }
  HWY_ALIGN float gathered[kValueKeys * kMaxDim];
  for (std::int64_t key = first; key < last; key += kValueKeys) {
    const std::int64_t count = std::min(kValueKeys, last - key);
    for (std::int64_t i = 0; i < count; ++i) {
      widen_row(rows + (key - first + i) * v.row_stride, v, tile.padded_value_dim,
                gathered + i * tile.padded_value_dim);
    }
    weigh_values<Float32Values>(tile, gathered, 4 * tile.padded_value_dim, 0, key, key + count,
                                result.o);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// Query rows, keys and values as tiles of bfloat16. Compiled per instruction set.
//
// A row of q or k is `parts` parts (its bfloat16 values; for float16 the high and the low ones) of
// steps of 32 elements, which are the 16 words of a tile's row. Packed are
//   q  row after row, the first operand of the scores;
//   k  for every 16 keys: [word of the row][key], the second operand;
//   v  for every 32 keys: [part][16 columns] tiles of [two keys][column], the second operand of the
//      outputs.
// Which two numbers share a word is free, as long as both operands agree: elements 2i and 2i + 1 of
// bfloat16 rows, as they lie in memory; elements i and i + 16 of a step of float16 rows, and keys i
// and i + 16 of 32, as no number then changes its lane.
#if defined(KEYFOLD_CPU_TILES_PACK_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_TILES_PACK_INL_HPP
#undef KEYFOLD_CPU_TILES_PACK_INL_HPP
#else
#define KEYFOLD_CPU_TILES_PACK_INL_HPP
#endif

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/pack-inl.hpp"
#include "cpu/product-inl.hpp"
#include "cpu/tiles/unit.hpp"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {
namespace base = keyfold::cpu::HWY_NAMESPACE;
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::int64_t kLanes = kTileRows;  // words in a row of a tile
constexpr std::int64_t kStep = 2 * kLanes;  // bfloat16 values in it
constexpr std::int64_t kTileWords = kTileBytes / 4;
static_assert(kMaxDim % kStep == 0);

constexpr int parts_of(DType dtype) { return dtype == DType::kFloat16 ? 2 : 1; }

/// The values that are split into kParts, as they lie in memory.
template <int kParts>
using ValuesOf = std::conditional_t<kParts == 2, base::Float16Values, base::BFloat16Values>;

inline std::int64_t words(DType dtype, std::int64_t dim) {
  return (dim + kStep - 1) / kStep * kLanes * parts_of(dtype);
}

/// A number as the sum of two bfloat16, as bits of float32.
template <class D>
struct Halves {
  hn::Vec<hn::RebindToUnsigned<D>> high, low;
};

/// Exact for float16: 11 significant bits in 8 + 8. Inf and NaN are all in the high one.
template <class D>
HWY_INLINE Halves<D> halves(D d, hn::Vec<D> x) {
  const hn::RebindToUnsigned<D> du;
  const auto high = hn::And(hn::BitCast(du, x), hn::Set(du, 0xffff0000));
  const auto rest = hn::Sub(x, hn::BitCast(d, high));
  return {high, hn::BitCast(du, hn::IfThenElseZero(hn::IsFinite(x), rest))};
}

/// Words whose halves are the upper halves of a and b.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V pair(D du, V a, V b) {
  return hn::OrAnd(hn::ShiftRight<16>(a), b, hn::Set(du, 0xffff0000));
}

/// Stores numbers a and b in words of pairs: what bfloat16 holds of them, and for two parts the
/// rest.
template <int kParts, class D, class V = hn::Vec<D>>
HWY_INLINE void store_pairs(D d, V a, V b, std::uint32_t* high, std::uint32_t* low) {
  const hn::RebindToUnsigned<D> du;
  if constexpr (kParts == 1) {
    hn::StoreU(pair(du, hn::BitCast(du, a), hn::BitCast(du, b)), du, high);
  } else {
    const Halves<D> first = halves(d, a), second = halves(d, b);
    hn::StoreU(pair(du, first.high, second.high), du, high);
    hn::StoreU(pair(du, first.low, second.low), du, low);
  }
}

/// One row of q or k as words, zeros behind.
template <int kParts>
inline void split_row(const std::byte* row, const RowSource& source, std::uint32_t* out) {
  const std::int64_t all = words(source.dtype, source.dim);
  if constexpr (kParts == 1) {
    base::pair_row(row, source, all, out);
  } else {
    const std::int64_t part = all / kParts;
    const auto split = [&]<class Values>(Values, const typename Values::Word* from) HWY_ATTR {
      const hn::CappedTag<float, kLanes> d;
      for (std::int64_t i = 0; i < part; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
        const auto* first = from + i / kLanes * kStep + i % kLanes;
        store_pairs<kParts>(d, Values::load(d, first), Values::load(d, first + kLanes), out + i,
                            out + part + i);
      }
    };
    using Values = ValuesOf<kParts>;
    if (source.dim_stride == 2 && source.dim % kStep == 0) {
      return split(Values(), reinterpret_cast<const typename Values::Word*>(row));
    }
    HWY_ALIGN float wide[kMaxDim];
    base::widen_row(row, source, 2 * part, wide);
    split(base::Float32Values(), wide);
  }
}

template <int kParts>
void pack_q(const RowSource& q, void* packed) {
  split_row<kParts>(q.data, q, static_cast<std::uint32_t*>(packed));
}

/// Whether rows of keys are words as they lie.
template <int kParts>
bool are_words(const RowSource& k) {
  return kParts == 1 && k.dim_stride == 2 && k.dim % kStep == 0;
}

template <int kParts>
void pack_k(const RowSource& k, std::int64_t count, void* packed_panel) {
  const std::int64_t num_words = words(k.dtype, k.dim);
  auto* out = static_cast<std::uint32_t*>(packed_panel);
  HWY_ALIGN std::uint32_t rows[kLanes * kMaxDim];
  const std::int64_t end = (count + kStep - 1) / kStep * kStep;
  for (std::int64_t first = 0; first < end; first += kLanes, out += kLanes * num_words) {
    const std::byte* from = k.data + first * k.row_stride;
    const std::int64_t here = std::clamp<std::int64_t>(count - first, 0, kLanes);
    for (std::int64_t i = 0; i < here; ++i) base::prefetch_ahead(from + i * k.row_stride, k);
    if (are_words<kParts>(k) && here == kLanes) {
      base::transpose_rows(from, k.row_stride, num_words, out, kLanes);
      continue;
    }
    for (std::int64_t i = 0; i < here; ++i) {
      split_row<kParts>(from + i * k.row_stride, k, rows + i * num_words);
    }
    std::fill(rows + here * num_words, rows + kLanes * num_words, 0U);
    base::transpose_rows(reinterpret_cast<const std::byte*>(rows), 4 * num_words, num_words, out,
                         kLanes);
  }
}

/// Packs the values of 32 keys, of which v has `count`; zeros behind.
template <int kParts>
void pack_values(const RowSource& v, std::int64_t count, std::int64_t padded_dim,
                 std::uint32_t* out) {
  const auto pack = [&]<class Values>(Values, const void* first, const void* second,
                                      std::int64_t i) HWY_ATTR {
    const hn::CappedTag<float, kLanes> d;
    const auto *a = static_cast<const typename Values::Word*>(first),
               *b = static_cast<const typename Values::Word*>(second);
    for (std::int64_t c = 0; c < padded_dim; c += static_cast<std::int64_t>(hn::MaxLanes(d))) {
      std::uint32_t* const at = out + c / kLanes * kTileWords + i * kLanes + c % kLanes;
      store_pairs<kParts>(d, Values::load(d, a + c), Values::load(d, b + c), at,
                          at + padded_dim * kLanes);
    }
  };
  const bool in_place = v.dim_stride == 2 && v.dim == padded_dim;
  HWY_ALIGN float wide[2][kMaxDim];
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const std::byte* const rows[2] = {v.data + i * v.row_stride,
                                      v.data + (i + kLanes) * v.row_stride};
    if (i < count) base::prefetch_ahead(rows[0], v);
    if (i + kLanes < count) base::prefetch_ahead(rows[1], v);
    if (in_place && i + kLanes < count) {
      pack(ValuesOf<kParts>(), rows[0], rows[1], i);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      if (i + half * kLanes < count) {
        base::widen_row(rows[half], v, padded_dim, wide[half]);
      } else {
        std::fill_n(wide[half], padded_dim, 0.0f);
      }
    }
    pack(base::Float32Values(), wide[0], wide[1], i);
  }
}

/// Words of 32 keys' packed values.
template <int kParts>
constexpr std::int64_t step_words(std::int64_t padded_dim) {
  return kParts * kLanes * padded_dim;
}

template <int kParts>
void pack_v(const RowSource& v, std::int64_t count, std::int64_t padded_dim, float* packed) {
  auto* out = reinterpret_cast<std::uint32_t*>(packed);
  RowSource rows = v;
  for (std::int64_t first = 0; first < count; first += kStep) {
    const std::int64_t here = std::min(count - first, kStep);
    pack_values<kParts>(rows, here, padded_dim, out);
    rows.data += kStep * v.row_stride;
    out += step_words<kParts>(padded_dim);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

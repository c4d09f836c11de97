// Query rows, keys and values as tiles of bfloat16. Compiled per instruction set.
//
// A row of q or k is `parts` parts (its bfloat16 values; for float16 the high and the low ones) of
// `steps` steps of 32 elements. Packed are
//   q  for every 16 rows: [word of the row][row], second operand of the scores;
//   k  for every 64 keys: [16 keys][part][step] tiles of [key][32 elements], the first operand;
//   v  for every 64 keys: [32 keys][part][16 columns] tiles of [column][32 keys], the first operand
//      of the outputs.
#if defined(KEYFOLD_CPU_TILES_PACK_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_TILES_PACK_INL_HPP
#undef KEYFOLD_CPU_TILES_PACK_INL_HPP
#else
#define KEYFOLD_CPU_TILES_PACK_INL_HPP
#endif

#include "cpu/pack-inl.hpp"
#include "cpu/tiles/unit.hpp"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {
namespace base = keyfold::cpu::HWY_NAMESPACE;
namespace hn = hwy::HWY_NAMESPACE;

constexpr std::int64_t kLanes = kTileRows;  // rows or keys side by side
constexpr std::int64_t kStep = 32;          // bfloat16 values in a row of a tile
constexpr std::int64_t kTileWords = kTileBytes / 4;
constexpr std::int64_t kMaxDim = 576;

constexpr int parts_of(DType dtype) { return dtype == DType::kFloat16 ? 2 : 1; }

inline std::int64_t words(DType dtype, std::int64_t dim) {
  return (dim + kStep - 1) / kStep * kLanes * parts_of(dtype);
}

/// Numbers as the sum of two bfloat16, which is exact for float16 (11 significant bits in 8 + 8),
/// and for bfloat16, whose low part is 0. Inf and NaN are all in the high one. As bits of float32,
/// the lower 16 of them 0.
template <class D>
struct Halves {
  using Bits = hn::Vec<hn::RebindToUnsigned<D>>;
  HWY_INLINE Halves(D d, hn::Vec<D> x) {
    const hn::RebindToUnsigned<D> du;
    const auto wide = hn::BitCast(d, hn::And(hn::BitCast(du, x), hn::Set(du, 0xffff0000)));
    const auto rest = hn::Sub(x, wide);
    const auto number = hn::Eq(rest, rest);  // Inf - Inf is NaN
    const auto all = hn::IfThenElse(hn::Eq(x, x), wide, hn::BitCast(d, hn::Set(du, 0x7fc00000)));
    high = hn::BitCast(du, all);
    low = hn::BitCast(du, hn::IfThenElseZero(number, rest));
  }
  Bits high, low;
};

/// One row as words of pairs of elements, zeros behind.
inline void split_row(const std::byte* row, const RowSource& source, std::uint32_t* out) {
  const std::int64_t all = words(source.dtype, source.dim);
  if (parts_of(source.dtype) == 1) return base::pair_row(row, source, all, out);
  const hn::CappedTag<float, kLanes> d;
  const hn::Rebind<std::uint16_t, decltype(d)> dh;
  HWY_ALIGN float wide[kMaxDim];
  base::widen_row(row, source, all, wide);
  auto* high = reinterpret_cast<std::uint16_t*>(out);
  for (std::int64_t i = 0; i < all; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const Halves<decltype(d)> x(d, hn::Load(d, wide + i));
    hn::StoreU(hn::TruncateTo(dh, hn::ShiftRight<16>(x.high)), dh, high + i);
    hn::StoreU(hn::TruncateTo(dh, hn::ShiftRight<16>(x.low)), dh, high + all + i);
  }
}

inline void pack_q(const RowSource& q, std::int64_t row, void* packed) {
  HWY_ALIGN std::uint32_t pairs[kMaxDim];
  split_row(q.data, q, pairs);
  const std::int64_t num_words = words(q.dtype, q.dim);
  auto* out = static_cast<std::uint32_t*>(packed) + row / kLanes * kLanes * num_words;
  for (std::int64_t w = 0; w < num_words; ++w) out[w * kLanes + row % kLanes] = pairs[w];
}

inline void pack_k(const RowSource& k, std::int64_t count, void* packed_panel) {
  HWY_ALIGN std::uint32_t pairs[kMaxDim] = {};
  const std::int64_t row_tiles = words(k.dtype, k.dim) / kLanes;
  const bool in_place = parts_of(k.dtype) == 1 && k.dim_stride == 2 && k.dim % kStep == 0;
  auto* panel = static_cast<std::uint32_t*>(packed_panel);
  for (std::int64_t key = 0; key < kPanel; ++key) {
    const std::byte* row = k.data + key * k.row_stride;
    if (key < count) {
      base::prefetch_ahead(row, k);
      if (!in_place) split_row(row, k, pairs);
    } else if (key == count) {
      std::memset(pairs, 0, sizeof pairs);
    }
    const bool copied = key >= count || !in_place;
    const auto* from = copied ? reinterpret_cast<const std::byte*>(pairs) : row;
    std::uint32_t* out = panel + key / kLanes * row_tiles * kTileWords + key % kLanes * kLanes;
    for (std::int64_t t = 0; t < row_tiles; ++t) {
      std::memcpy(out + t * kTileWords, from + t * kTileRowBytes, kTileRowBytes);
    }
  }
}

/// The values of two keys as words of pairs.
inline void pair_keys(const float* even, const float* odd, std::int64_t dim, std::uint32_t* high,
                      std::uint32_t* low) {
  const hn::CappedTag<float, kLanes> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  for (std::int64_t i = 0; i < dim; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const Halves<decltype(d)> a(d, hn::Load(d, even + i)), b(d, hn::Load(d, odd + i));
    hn::StoreU(hn::Or(hn::ShiftRight<16>(a.high), b.high), du, high + i);
    hn::StoreU(hn::Or(hn::ShiftRight<16>(a.low), b.low), du, low + i);
  }
}

/// Zeros up to the end of the last 32 keys and up to padded_dim.
inline void pack_v(const RowSource& v, std::int64_t count, std::int64_t padded_dim, float* packed) {
  const int parts = parts_of(v.dtype);
  HWY_ALIGN float wide[2][kMaxDim];
  HWY_ALIGN std::uint32_t pairs[2][kLanes * kMaxDim];  // [part][two keys][column]
  auto* out = reinterpret_cast<std::uint32_t*>(packed);
  for (std::int64_t first = 0; first < count; first += kStep) {
    for (std::int64_t i = 0; i < kStep; ++i) {
      float* const row = wide[i % 2];
      if (first + i < count) {
        const std::byte* source = v.data + (first + i) * v.row_stride;
        base::prefetch_ahead(source, v);
        base::widen_row(source, v, padded_dim, row);
      } else {
        std::fill_n(row, padded_dim, 0.0f);
      }
      const std::int64_t at = i / 2 * padded_dim;
      if (i % 2 == 1) pair_keys(wide[0], wide[1], padded_dim, pairs[0] + at, pairs[1] + at);
    }
    for (int part = 0; part < parts; ++part) {
      base::transpose_rows(reinterpret_cast<const std::byte*>(pairs[part]), 4 * padded_dim,
                           padded_dim, out, kLanes);
      out += padded_dim * kLanes;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

// Packing of query rows, keys and values into what the products read. Compiled per instruction set.
#if defined(KEYFOLD_CPU_PACK_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_PACK_INL_HPP
#undef KEYFOLD_CPU_PACK_INL_HPP
#else
#define KEYFOLD_CPU_PACK_INL_HPP
#endif

#include <cstring>

#include "core/half.hpp"
#include "cpu/kernels.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Whether rows of this dtype are multiplied as bfloat16 pairs.
inline bool as_pairs(DType dtype) { return KEYFOLD_HAS_BF16_PAIRS && dtype == DType::kBFloat16; }

inline std::int64_t words(DType dtype, std::int64_t head_dim) {
  return as_pairs(dtype) ? (head_dim + 1) / 2 : head_dim;
}

/// One row as float32, zeros up to padded_dim.
inline void widen_row(const std::byte* row, const RowSource& source, std::int64_t padded_dim,
                      float* out) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  std::int64_t i = 0;
  if (source.dim_stride == size_of(source.dtype)) {
    if (source.dtype == DType::kFloat32) {
      std::memcpy(out, row, static_cast<std::size_t>(source.dim) * sizeof(float));
      i = source.dim;
    } else if (source.dtype == DType::kFloat16) {
#if HWY_TARGET != HWY_SCALAR  // whose PromoteTo takes Inf and NaN for numbers
      const hn::Rebind<hwy::float16_t, decltype(d)> dh;
      const auto* p = reinterpret_cast<const hwy::float16_t*>(row);
      for (; i + kLanes <= source.dim; i += kLanes) {
        hn::StoreU(hn::PromoteTo(d, hn::LoadU(dh, p + i)), d, out + i);
      }
#endif
    } else {
      const hn::Rebind<hwy::bfloat16_t, decltype(d)> db;
      const auto* p = reinterpret_cast<const hwy::bfloat16_t*>(row);
      for (; i + kLanes <= source.dim; i += kLanes) {
        hn::StoreU(hn::PromoteTo(d, hn::LoadU(db, p + i)), d, out + i);
      }
    }
  }
  for (; i < source.dim; ++i) {
    out[i] = core::load_float(row + i * source.dim_stride, source.dtype);
  }
  for (; i < padded_dim; ++i) out[i] = 0;
}

/// One row as bfloat16 pairs, zeros up to padded_words.
inline void pair_row(const std::byte* row, const RowSource& source, std::int64_t padded_words,
                     std::uint32_t* out) {
  std::memset(out, 0, static_cast<std::size_t>(padded_words) * sizeof *out);
  if (source.dim_stride == 2) {
    std::memcpy(out, row, static_cast<std::size_t>(source.dim) * 2);
    return;
  }
  auto* elements = reinterpret_cast<std::byte*>(out);
  for (std::int64_t i = 0; i < source.dim; ++i) {
    std::memcpy(elements + 2 * i, row + i * source.dim_stride, 2);
  }
}

/// Asks for the row that is packed some rows later: the processor's own prefetch stops at page
/// ends.
inline void prefetch_ahead(const std::byte* row, const RowSource& source) {
  constexpr std::int64_t kRowsAhead = 24, kCacheLine = 64;
  if (source.dim_stride != size_of(source.dtype)) return;
  const std::byte* const ahead = row + kRowsAhead * source.row_stride;
  for (std::int64_t i = 0; i < source.dim * source.dim_stride; i += kCacheLine) {
    __builtin_prefetch(ahead + i);
  }
}

/// One row as words.
inline void pack_row(const std::byte* row, const RowSource& source, std::int64_t padded_words,
                     std::uint32_t* out) {
  if (as_pairs(source.dtype)) {
    pair_row(row, source, padded_words, out);
  } else {
    widen_row(row, source, padded_words, reinterpret_cast<float*>(out));
  }
}

inline void pack_q(const RowSource& q, std::int64_t row, void* packed) {
  const std::int64_t num_words = words(q.dtype, q.dim);
  pack_row(q.data, q, num_words, static_cast<std::uint32_t*>(packed) + row * num_words);
}

inline void pack_v(const RowSource& v, std::int64_t count, std::int64_t padded_dim, float* packed) {
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch_ahead(v.data + i * v.row_stride, v);
    widen_row(v.data + i * v.row_stride, v, padded_dim, packed + i * padded_dim);
  }
}

constexpr std::int64_t kTransposeRows = 16;  // keys transposed together: the widest vector's lanes

#if HWY_TARGET != HWY_SCALAR
/// Blocks of four words from rows p, p + step, ...: block b of the vector is row b's.
template <class D>
HWY_INLINE hn::Vec<D> load_blocks(D d, const std::byte* p, std::int64_t step) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return hn::LoadU(d, reinterpret_cast<const std::uint32_t*>(p));
  } else {
    const hn::Half<D> dh;
    constexpr auto kHalfBlocks = static_cast<std::int64_t>(hn::MaxLanes(dh)) / 4;
    return hn::Combine(d, load_blocks(dh, p + kHalfBlocks * step, step), load_blocks(dh, p, step));
  }
}
#endif

/// Transposes kTransposeRows rows of `num_words` words (a multiple of 4 readable): word w of row i
/// goes to out[w * out_stride + i]. `stride` is in bytes, `out_stride` in words.
inline void transpose_rows(const std::byte* rows, std::int64_t stride, std::int64_t num_words,
                           std::uint32_t* out, std::int64_t out_stride = kPanel) {
#if HWY_TARGET == HWY_SCALAR
  for (std::int64_t i = 0; i < kTransposeRows; ++i) {
    for (std::int64_t w = 0; w < num_words; ++w) {
      std::memcpy(out + w * out_stride + i, rows + i * stride + 4 * w, sizeof *out);
    }
  }
#else
  const hn::ScalableTag<std::uint32_t> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  for (std::int64_t i = 0; i < kTransposeRows; i += kLanes) {
    for (std::int64_t w = 0; w < num_words; w += 4) {
      // Each vector holds row r of every four rows; the 4x4 transposes stay inside 128-bit blocks.
      const std::byte* p = rows + i * stride + 4 * w;
      const auto r0 = load_blocks(d, p, 4 * stride);
      const auto r1 = load_blocks(d, p + stride, 4 * stride);
      const auto r2 = load_blocks(d, p + 2 * stride, 4 * stride);
      const auto r3 = load_blocks(d, p + 3 * stride, 4 * stride);
      const auto even_low = hn::InterleaveLower(d, r0, r2),
                 even_high = hn::InterleaveUpper(d, r0, r2);
      const auto odd_low = hn::InterleaveLower(d, r1, r3),
                 odd_high = hn::InterleaveUpper(d, r1, r3);
      std::uint32_t* column = out + w * out_stride + i;
      const std::int64_t left = num_words - w;
      hn::StoreU(hn::InterleaveLower(d, even_low, odd_low), d, column);
      if (left > 1) hn::StoreU(hn::InterleaveUpper(d, even_low, odd_low), d, column + out_stride);
      if (left > 2)
        hn::StoreU(hn::InterleaveLower(d, even_high, odd_high), d, column + 2 * out_stride);
      if (left > 3)
        hn::StoreU(hn::InterleaveUpper(d, even_high, odd_high), d, column + 3 * out_stride);
    }
  }
#endif
}

inline void pack_k(const RowSource& k, std::int64_t count, void* packed_panel) {
  constexpr std::int64_t kMaxWords = 576;
  const std::int64_t num_words = words(k.dtype, k.dim);
  const std::int64_t padded_words = (num_words + 3) / 4 * 4;
  auto* out = static_cast<std::uint32_t*>(packed_panel);
  // Rows that are words already are transposed where they lie.
  const bool in_place = (k.dtype == DType::kFloat32 || as_pairs(k.dtype)) &&
                        k.dim_stride == size_of(k.dtype) &&
                        k.dim * size_of(k.dtype) == 4 * padded_words;
  HWY_ALIGN std::uint32_t rows[kTransposeRows * kMaxWords];
  for (std::int64_t first = 0; first < kPanel; first += kTransposeRows) {
    const std::byte* source = k.data + first * k.row_stride;
    const std::int64_t here = std::min(kTransposeRows, count - first);
    for (std::int64_t i = 0; i < here; ++i) prefetch_ahead(source + i * k.row_stride, k);
    if (in_place && here == kTransposeRows) {
      transpose_rows(source, k.row_stride, num_words, out + first);
      continue;
    }
    for (std::int64_t i = 0; i < kTransposeRows; ++i) {
      std::uint32_t* row = rows + i * padded_words;
      if (i < here) {
        pack_row(source + i * k.row_stride, k, padded_words, row);
      } else {
        std::memset(row, 0, static_cast<std::size_t>(padded_words) * sizeof *row);
      }
    }
    transpose_rows(reinterpret_cast<const std::byte*>(rows), 4 * padded_words, num_words,
                   out + first);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

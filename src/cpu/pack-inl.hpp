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
#include "cpu/product-inl.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Whether rows of this dtype are multiplied as bfloat16 pairs, by kernels that do so (kPairs).
template <bool kPairs>
bool as_pairs(DType dtype) {
  return kPairs && dtype == DType::kBFloat16;
}

template <bool kPairs>
std::int64_t words(DType dtype, std::int64_t head_dim) {
  return as_pairs<kPairs>(dtype) ? (head_dim + 1) / 2 : head_dim;
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
template <bool kPairs>
void pack_row(const std::byte* row, const RowSource& source, std::int64_t padded_words,
              std::uint32_t* out) {
  if (as_pairs<kPairs>(source.dtype)) {
    pair_row(row, source, padded_words, out);
  } else {
    widen_row(row, source, padded_words, reinterpret_cast<float*>(out));
  }
}

template <bool kPairs>
void pack_q(const RowSource& q, void* packed) {
  pack_row<kPairs>(q.data, q, words<kPairs>(q.dtype, q.dim), static_cast<std::uint32_t*>(packed));
}

constexpr std::int64_t kTransposeRows = 16;  // keys transposed together: the widest vector's lanes

#if HWY_TARGET != HWY_SCALAR
/// Blocks of four elements from rows p, p + step, ...: block b of the vector is row b's.
template <class D>
HWY_INLINE hn::Vec<D> load_blocks(D d, const std::byte* p, std::int64_t step) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return hn::LoadU(d, reinterpret_cast<const hn::TFromD<D>*>(p));
  } else {
    const hn::Half<D> dh;
    constexpr auto kHalfBlocks = static_cast<std::int64_t>(hn::MaxLanes(dh)) / 4;
    return hn::Combine(d, load_blocks(dh, p + kHalfBlocks * step, step), load_blocks(dh, p, step));
  }
}

/// Vector r of `rows` holds row r of every four rows; columns[w] is word w of all of them. The 4x4
/// transposes stay inside 128-bit blocks.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void transpose_blocks(D d, const V (&rows)[4], V (&columns)[4]) {
  const V even_low = hn::InterleaveLower(d, rows[0], rows[2]);
  const V odd_low = hn::InterleaveLower(d, rows[1], rows[3]);
  const V even_high = hn::InterleaveUpper(d, rows[0], rows[2]);
  const V odd_high = hn::InterleaveUpper(d, rows[1], rows[3]);
  columns[0] = hn::InterleaveLower(d, even_low, odd_low);
  columns[1] = hn::InterleaveUpper(d, even_low, odd_low);
  columns[2] = hn::InterleaveLower(d, even_high, odd_high);
  columns[3] = hn::InterleaveUpper(d, even_high, odd_high);
}
#endif

/// Transposes four words of as many rows as a vector has lanes: columns[w] is word w of all rows.
/// Stride in bytes.
template <class D, class V = hn::Vec<D>>
HWY_INLINE void load_columns(D d, const std::byte* rows, std::int64_t stride, V (&columns)[4]) {
#if HWY_TARGET == HWY_SCALAR
  (void)stride;
  for (int w = 0; w < 4; ++w) {
    std::uint32_t word = 0;
    std::memcpy(&word, rows + 4 * w, sizeof word);
    columns[w] = hn::Set(d, word);
  }
#else
  const V blocks[4] = {load_blocks(d, rows, 4 * stride), load_blocks(d, rows + stride, 4 * stride),
                       load_blocks(d, rows + 2 * stride, 4 * stride),
                       load_blocks(d, rows + 3 * stride, 4 * stride)};
  transpose_blocks(d, blocks, columns);
#endif
}

/// Transposes as many rows of `num_words` words (a multiple of 4 readable) as a vector has lanes:
/// word w of row i goes to out[w * out_stride + i]. `stride` is in bytes, `out_stride` in words.
inline void transpose_vector(const std::byte* rows, std::int64_t stride, std::int64_t num_words,
                             std::uint32_t* out, std::int64_t out_stride) {
  const hn::ScalableTag<std::uint32_t> d;
  for (std::int64_t w = 0; w < num_words; w += 4) {
    hn::Vec<decltype(d)> columns[4];
    load_columns(d, rows + 4 * w, stride, columns);
    std::uint32_t* column = out + w * out_stride;
    const std::int64_t left = num_words - w;
    hn::StoreU(columns[0], d, column);
    if (left > 1) hn::StoreU(columns[1], d, column + out_stride);
    if (left > 2) hn::StoreU(columns[2], d, column + 2 * out_stride);
    if (left > 3) hn::StoreU(columns[3], d, column + 3 * out_stride);
  }
}

/// Likewise kTransposeRows rows.
inline void transpose_rows(const std::byte* rows, std::int64_t stride, std::int64_t num_words,
                           std::uint32_t* out, std::int64_t out_stride) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  for (std::int64_t i = 0; i < kTransposeRows; i += kLanes) {
    transpose_vector(rows + i * stride, stride, num_words, out + i, out_stride);
  }
}

/// A packed panel of keys is strips of kStrip keys, each [words][kStrip]; one of values is strips
/// of as many columns, each [kPanel][columns], the last of what is left: what a register tile reads
/// lies together.
template <bool kPairs>
void pack_k(const RowSource& k, std::int64_t count, void* packed_panel) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  static_assert(kPanel % kStrip == 0 && kTransposeRows % kLanes == 0);
  const std::int64_t num_words = words<kPairs>(k.dtype, k.dim);
  const std::int64_t padded_words = (num_words + 3) / 4 * 4;
  auto* out = static_cast<std::uint32_t*>(packed_panel);
  // Rows that are words already are transposed where they lie.
  const bool in_place = (k.dtype == DType::kFloat32 || as_pairs<kPairs>(k.dtype)) &&
                        k.dim_stride == size_of(k.dtype) &&
                        k.dim * size_of(k.dtype) == 4 * padded_words;
  HWY_ALIGN std::uint32_t rows[kTransposeRows * kMaxDim];
  for (std::int64_t first = 0; first < count; first += kTransposeRows) {
    const std::byte* source = k.data + first * k.row_stride;
    std::int64_t stride = k.row_stride;
    const std::int64_t here = std::min(kTransposeRows, count - first);
    for (std::int64_t i = 0; i < here; ++i) prefetch_ahead(source + i * k.row_stride, k);
    if (!in_place || here < kTransposeRows) {
      for (std::int64_t i = 0; i < kTransposeRows; ++i) {
        std::uint32_t* row = rows + i * padded_words;
        if (i < here) {
          pack_row<kPairs>(source + i * k.row_stride, k, padded_words, row);
        } else {
          std::memset(row, 0, static_cast<std::size_t>(padded_words) * sizeof *row);
        }
      }
      source = reinterpret_cast<const std::byte*>(rows);
      stride = 4 * padded_words;
    }
    for (std::int64_t i = 0; i < kTransposeRows; i += kLanes) {
      const std::int64_t key = first + i;
      transpose_vector(source + i * stride, stride, num_words,
                       out + key / kStrip * kStrip * num_words + key % kStrip, kStrip);
    }
  }
}

/// A packed panel's values of keys in columns [first, first + count): those of one key to the next
/// lie `count` apart.
struct ValueStrip {
  ValueStrip(std::int64_t column, std::int64_t dim)
      : first(column / kStrip * kStrip), count(std::min(kStrip, dim - first)) {}
  std::int64_t at(std::int64_t key, std::int64_t column) const {
    return first * kPanel + key * count + column - first;
  }
  std::int64_t first, count;
};

inline void pack_v(const RowSource& v, std::int64_t count, std::int64_t padded_dim,
                   float* packed_panel) {
  const hn::ScalableTag<float> d;
  HWY_ALIGN float wide[kMaxDim];
  const bool in_place = v.dim_stride == size_of(v.dtype) && v.dim == padded_dim;
  for (std::int64_t key = 0; key < count; ++key) {
    const std::byte* const row = v.data + key * v.row_stride;
    const auto store = [&]<class Values>(Values, const void* from) HWY_ATTR {
      const auto* values = static_cast<const typename Values::Word*>(from);
      for (std::int64_t i = 0; i < padded_dim; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
        hn::StoreU(Values::load(d, values + i), d,
                   packed_panel + ValueStrip(i, padded_dim).at(key, i));
      }
    };
    prefetch_ahead(row, v);
    if (!in_place) {
      widen_row(row, v, padded_dim, wide);
    } else if (v.dtype == DType::kFloat32) {
      store(Float32Values(), row);
      continue;
    } else if (v.dtype == DType::kFloat16) {
      store(Float16Values(), row);
      continue;
    } else {
      store(BFloat16Values(), row);
      continue;
    }
    store(Float32Values(), wide);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

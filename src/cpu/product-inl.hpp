// The product that both schedules are made of: a few rows of numbers times rows of vectors.
// Compiled per instruction set.
#if defined(KEYFOLD_CPU_PRODUCT_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_PRODUCT_INL_HPP
#undef KEYFOLD_CPU_PRODUCT_INL_HPP
#else
#define KEYFOLD_CPU_PRODUCT_INL_HPP
#endif

#include <cstdint>
#include <type_traits>

#include "core/half.hpp"
#include "cpu/vector_math-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows x vectors of accumulators that fit the register file with their operands: 12 x 2 needs fewer
// loads for each multiply-add than 6 x 4, and half of the cache for its vectors.
#if HWY_TARGET == HWY_SCALAR
constexpr int kRowTile = 2, kTileVectors = 4;
#elif HWY_TARGET == HWY_AVX2
constexpr int kRowTile = 6, kTileVectors = 2;
#elif HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
constexpr int kRowTile = 12, kTileVectors = 2;
#else
constexpr int kRowTile = 6, kTileVectors = 4;
#endif

/// Keys, or columns of values, that a register tile has.
constexpr std::int64_t kStrip =
    static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>())) * kTileVectors;

/// Values of a dtype, widened as they are loaded.
struct Float32Values {
  using Word = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Word* p) {
    return hn::LoadU(d, p);
  }
};

struct BFloat16Values {
  using Word = hwy::bfloat16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Word* p) {
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<Word, D>(), p));
  }
};

struct Float16Values {
  using Word = hwy::float16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> load(D d, const Word* p) {
#if HWY_TARGET == HWY_SCALAR  // whose PromoteTo takes Inf and NaN for numbers
    return hn::Set(d, core::load_float(p, DType::kFloat16));
#else
    return hn::PromoteTo(d, hn::LoadU(hn::Rebind<Word, D>(), p));
#endif
  }
};

/// sum[r][:] += sum over i of a[r][i] * b[i][:].
template <class Words, class Loader, int kRows, int kWidth, class V>
HWY_INLINE void multiply(const typename Words::Word* HWY_RESTRICT a, std::int64_t a_stride,
                         const typename Loader::Word* HWY_RESTRICT b, std::int64_t b_stride,
                         std::int64_t count, V (&sum)[kRows][kWidth]) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  for (std::int64_t i = 0; i < count; ++i) {
    V right[kWidth];
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) right[w] = Loader::load(d, b + i * b_stride + w * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V left = Words::broadcast(d, a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) {
        sum[r][w] = Words::multiply_add(left, right[w], sum[r][w]);
      }
    }
  }
}

/// Zeros, or what c holds.
template <int kRows, int kWidth, class V>
HWY_INLINE void load_sums(bool accumulate, const float* c, std::int64_t c_stride,
                          V (&sum)[kRows][kWidth]) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) {
      sum[r][w] = accumulate ? hn::LoadU(d, c + r * c_stride + w * kLanes) : hn::Zero(d);
    }
  }
}

template <int kRows, int kWidth, class V>
HWY_INLINE void store_sums(const V (&sum)[kRows][kWidth], float* c, std::int64_t c_stride) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) hn::StoreU(sum[r][w], d, c + r * c_stride + w * kLanes);
  }
}

/// c[r][:] (+)= sum over i of a[r][i] * b[i][:] for kRows rows and kWidth vectors.
template <class Words, class Loader, int kRows, int kWidth>
HWY_INLINE void product(const typename Words::Word* HWY_RESTRICT a, std::int64_t a_stride,
                        const typename Loader::Word* HWY_RESTRICT b, std::int64_t b_stride,
                        std::int64_t count, bool accumulate, float* HWY_RESTRICT c,
                        std::int64_t c_stride) {
  hn::Vec<hn::ScalableTag<float>> sum[kRows][kWidth];
  load_sums(accumulate, c, c_stride, sum);
  multiply<Words, Loader>(a, a_stride, b, b_stride, count, sum);
  store_sums(sum, c, c_stride);
}

/// o[r][:] (+)= weights of row r times the rows of v, `dim` columns (whole vectors), kWidth vectors
/// at a time. before(column) is called before each such strip.
template <class Values, int kRows, int kWidth, class Before>
HWY_INLINE void weigh_columns(const float* weights, std::int64_t weights_stride,
                              const typename Values::Word* v, std::int64_t v_stride,
                              std::int64_t count, bool accumulate, float* o, std::int64_t dim,
                              std::int64_t column, const Before& before) {
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(hn::ScalableTag<float>()));
  for (; column + kWidth * kLanes <= dim; column += kWidth * kLanes) {
    before(column, kWidth * kLanes);
    product<FloatWords, Values, kRows, kWidth>(weights, weights_stride, v + column, v_stride, count,
                                               accumulate, o + column, dim);
  }
  if constexpr (kWidth > 1) {
    if (column == dim) return;
    weigh_columns<Values, kRows, kWidth / 2>(weights, weights_stride, v, v_stride, count,
                                             accumulate, o, dim, column, before);
  }
}

/// call(std::integral_constant<int, rows>) with rows = num_rows <= kRows.
template <int kRows, class Call>
HWY_INLINE void with_rows(std::int64_t num_rows, const Call& call) {
  if (num_rows == kRows) {
    call(std::integral_constant<int, kRows>());
  } else if constexpr (kRows > 1) {
    with_rows<kRows - 1>(num_rows, call);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

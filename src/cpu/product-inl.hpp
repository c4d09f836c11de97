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

/// c[r][:] (+)= sum over i of a[r][i] * b[i][:] for kRows rows and kWidth vectors.
template <class Words, class Loader, int kRows, int kWidth>
HWY_INLINE void product(const typename Words::Word* HWY_RESTRICT a, std::int64_t a_stride,
                        const typename Loader::Word* HWY_RESTRICT b, std::int64_t b_stride,
                        std::int64_t count, bool accumulate, float* HWY_RESTRICT c,
                        std::int64_t c_stride) {
  const hn::ScalableTag<float> d;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  hn::Vec<decltype(d)> sum[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) {
      sum[r][w] = accumulate ? hn::LoadU(d, c + r * c_stride + w * kLanes) : hn::Zero(d);
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    hn::Vec<decltype(d)> right[kWidth];
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) right[w] = Loader::load(d, b + i * b_stride + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto left = Words::broadcast(d, a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int w = 0; w < kWidth; ++w) {
        sum[r][w] = Words::multiply_add(left, right[w], sum[r][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < kWidth; ++w) hn::StoreU(sum[r][w], d, c + r * c_stride + w * kLanes);
  }
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

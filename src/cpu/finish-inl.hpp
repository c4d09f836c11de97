// The end of a row: normalised, and rounded to the output's dtype. Compiled per instruction set.
#if defined(KEYFOLD_CPU_FINISH_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_FINISH_INL_HPP
#undef KEYFOLD_CPU_FINISH_INL_HPP
#else
#define KEYFOLD_CPU_FINISH_INL_HPP
#endif

#include <algorithm>
#include <cstring>

#include "core/half.hpp"
#include "core/normalise.hpp"
#include "cpu/kernels.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// As core::float_to_bfloat16 and core::float_to_float16.
template <class D>
HWY_INLINE hn::Vec<hn::Rebind<std::uint16_t, D>> round_to_half([[maybe_unused]] D d, hn::Vec<D> x,
                                                               DType dtype) {
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::RebindToUnsigned<D> du;
  const auto bits = hn::BitCast(du, x);
  const auto nan = hn::RebindMask(du, hn::IsNaN(x));
  if (dtype == DType::kBFloat16) {
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
    const auto near = hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fff)));
    const auto quiet = hn::Or(bits, hn::Set(du, 0x400000));
    return hn::TruncateTo(d16, hn::ShiftRight<16>(hn::IfThenElse(nan, quiet, near)));
  }
#if HWY_TARGET == HWY_SCALAR  // whose DemoteTo takes Inf and NaN for numbers
  return hn::Set(d16, core::float_to_float16(hn::GetLane(x)));
#else
  const hn::Rebind<hwy::float16_t, D> dh;
  const auto quiet = hn::Or(hn::And(bits, hn::Set(du, 0x80000000u)), hn::Set(du, 0x7fc00000u));
  return hn::BitCast(d16, hn::DemoteTo(dh, hn::BitCast(d, hn::IfThenElse(nan, quiet, bits))));
#endif
}

/// core::normalised() of every element, rounded to the dtype and stored `step` bytes apart.
inline void finish_row(const core::RowEnd& end, const float* o, std::int64_t dim, DType dtype,
                       std::byte* out, std::int64_t step) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<std::uint16_t, decltype(d)> d16;
  constexpr auto kLanes = static_cast<std::int64_t>(hn::MaxLanes(d));
  HWY_ALIGN float whole[kMaxDim];
  HWY_ALIGN std::uint16_t half[kMaxDim];
  const bool nothing = end.l == 0 || end.weight == 0;
  const auto weight = hn::Set(d, end.weight), l = hn::Set(d, end.l), zero = hn::Zero(d);
  for (std::int64_t i = 0; i < dim; i += kLanes) {  // o is padded
    const auto x = hn::Add(hn::Div(hn::Mul(weight, hn::LoadU(d, o + i)), l), zero);
    const auto result = nothing ? zero : x;
    if (dtype == DType::kFloat32) {
      hn::Store(result, d, whole + i);
    } else {
      hn::Store(round_to_half(d, result, dtype), d16, half + i);
    }
  }
  const auto* from = dtype == DType::kFloat32 ? reinterpret_cast<const std::byte*>(whole)
                                              : reinterpret_cast<const std::byte*>(half);
  const auto size = size_of(dtype);
  if (step == size) {
    std::memcpy(out, from, static_cast<std::size_t>(dim * size));
    return;
  }
  for (std::int64_t i = 0; i < dim; ++i) {
    std::memcpy(out + i * step, from + i * size, static_cast<std::size_t>(size));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

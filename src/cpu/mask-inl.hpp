// A few keys of a mask's row as float32 biases. Compiled per instruction set.
#if defined(KEYFOLD_CPU_MASK_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_MASK_INL_HPP
#undef KEYFOLD_CPU_MASK_INL_HPP
#else
#define KEYFOLD_CPU_MASK_INL_HPP
#endif

#include <cmath>
#include <cstring>

#include "cpu/pack-inl.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Of kPanel bytes: whether any is not 0, and whether none is 0.
HWY_INLINE Seen seen_of_bytes(const std::uint8_t* bytes) {
  constexpr std::uint64_t kLow = 0x7f7f7f7f7f7f7f7f;
  std::uint64_t any = 0, all = ~std::uint64_t{0};
  for (std::int64_t i = 0; i < kPanel; i += 8) {
    std::uint64_t x = 0;
    std::memcpy(&x, bytes + i, sizeof x);
    any |= x;
    all &= ((x & kLow) + kLow) | x;  // a byte's highest bit: the byte is not 0
  }
  if (any == 0) return Seen::kNothing;
  return (~all & ~kLow) == 0 ? Seen::kWhole : Seen::kBiased;
}

inline Seen gather_bytes(const RowSource& mask, float* bias) {
  std::uint8_t bytes[kPanel];
  const auto* from = reinterpret_cast<const std::uint8_t*>(mask.data);
  if (mask.dim_stride != 1 || mask.dim < kPanel) {
    for (std::int64_t i = 0; i < mask.dim; ++i) bytes[i] = from[i * mask.dim_stride];
    std::memset(bytes + mask.dim, bytes[0], static_cast<std::size_t>(kPanel - mask.dim));
    from = bytes;
  }
  const Seen seen = seen_of_bytes(from);
  if (seen == Seen::kBiased) {
    for (std::int64_t i = 0; i < mask.dim; ++i) bias[i] = from[i] != 0 ? 0.0f : -INFINITY;
  }
  return seen;
}

/// As Kernels::gather_bias says.
inline Seen gather_bias(const RowSource& mask, float* bias) {
  if (mask.dtype == DType::kBool) return gather_bytes(mask, bias);
  const hn::CappedTag<float, 16> d;
  HWY_ALIGN float wide[kPanel];
  widen_row(mask.data, mask, mask.dim, wide);
  std::fill(wide + mask.dim, wide + kPanel, wide[0]);
  const auto hidden = hn::Set(d, -INFINITY);
  auto any = hn::Zero(d), all = hn::Zero(d);  // 0 where every key is hidden; has no bias
  for (std::int64_t i = 0; i < kPanel; i += static_cast<std::int64_t>(hn::MaxLanes(d))) {
    const auto x = hn::Load(d, wide + i);
    any = hn::IfThenElse(hn::Eq(x, hidden), any, hn::Set(d, 1.0f));
    all = hn::IfThenElse(hn::Eq(x, hn::Zero(d)), all, hn::Set(d, 1.0f));
  }
  if (hn::AllTrue(d, hn::Eq(any, hn::Zero(d)))) return Seen::kNothing;
  if (hn::AllTrue(d, hn::Eq(all, hn::Zero(d)))) return Seen::kWhole;
  std::memcpy(bias, wide, static_cast<std::size_t>(mask.dim) * sizeof *bias);
  return Seen::kBiased;
}

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

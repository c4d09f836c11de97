// Vector exp, and the multiply-adds of the product kernels. Compiled once per instruction set.
#if defined(KEYFOLD_CPU_VECTOR_MATH_INL_HPP) == defined(HWY_TARGET_TOGGLE)
#ifdef KEYFOLD_CPU_VECTOR_MATH_INL_HPP
#undef KEYFOLD_CPU_VECTOR_MATH_INL_HPP
#else
#define KEYFOLD_CPU_VECTOR_MATH_INL_HPP
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// exp(x) for x <= 0: 2^n * p(r) with x = n ln2 + r, |r| <= ln2 / 2, and p a degree-6 polynomial
/// (Chebyshev fit, relative error 8e-9). ln2 is in two parts, the first so short that n times it is
/// exact without a fused multiply-add. Results below the normal range are 0, as subnormals would
/// slow every multiply that follows. NaN gives NaN. Several vectors go side by side, step by step:
/// chains one after another would fill the scheduler with operations that wait.
template <class D, int kCount, class V = hn::Vec<D>>
HWY_INLINE void exp_nonpositive(D d, V (&x)[kCount]) {
  const hn::RebindToUnsigned<D> du;
  // Added to a number this rounds it to the nearest integer n, and leaves n + 127, the exponent of
  // 2^n, in the lowest bits.
  const V rounder = hn::Set(d, 0x1.8p+23f + 127);
  V rounded[kCount], r[kCount], p[kCount];
  const auto each = [](const auto& step) HWY_ATTR {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) step(i);
  };
  each([&](int i) HWY_ATTR { rounded[i] = hn::MulAdd(x[i], hn::Set(d, 0x1.715476p+0f), rounder); });
  each([&](int i) HWY_ATTR {
    const V n = hn::Sub(rounded[i], rounder);
    r[i] = hn::NegMulAdd(n, hn::Set(d, 0x1.62e4p-1f), x[i]);
    r[i] = hn::NegMulAdd(n, hn::Set(d, 0x1.7f7d1cp-20f), r[i]);
    p[i] = hn::Set(d, 0x1.6d110ap-10f);
  });
#pragma GCC unroll 6
  for (const float c :
       {0x1.120b6ep-7f, 0x1.55551ap-5f, 0x1.5554dcp-3f, 0x1.0p-1f, 0x1.0p+0f, 0x1.0p+0f}) {
    each([&](int i) HWY_ATTR { p[i] = hn::MulAdd(p[i], r[i], hn::Set(d, c)); });
  }
  each([&](int i) HWY_ATTR {
    const V result = hn::Mul(p[i], hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(du, rounded[i]))));
    x[i] = hn::IfThenElse(hn::Lt(x[i], hn::Set(d, -0x1.5d589ep+6f)), hn::Zero(d), result);
  });
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V exp_nonpositive(D d, V x) {
  V one[1] = {x};
  exp_nonpositive(d, one);
  return one[0];
}

/// Products of float32 words.
struct FloatWords {
  using Word = float;
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V load(D d, const Word* p) {
    return hn::LoadU(d, p);
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V broadcast(D d, Word word) {
    return hn::Set(d, word);
  }
  template <class V>
  static HWY_INLINE V multiply_add(V a, V b, V sum) {
    return hn::MulAdd(a, b, sum);
  }
};

#undef KEYFOLD_HAS_BF16_PAIRS
#if HWY_TARGET == HWY_AVX3_DL || (HWY_TARGET == HWY_NEON && HWY_ARCH_ARM_A64)
#define KEYFOLD_HAS_BF16_PAIRS 1
/// Products of bfloat16 pairs. Highway 1.0.3 has no such operation; the assembler form of the
/// intrinsic needs no target attribute beyond the one this namespace is compiled for. NEON without
/// it is the same target: there a template parameter tells the two kernels apart.
struct BFloat16Pairs {
  using Word = std::uint32_t;
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V load(D d, const Word* p) {
    return hn::BitCast(d, hn::LoadU(hn::RebindToUnsigned<D>(), p));
  }
  template <class D, class V = hn::Vec<D>>
  static HWY_INLINE V broadcast(D d, Word word) {
    return hn::BitCast(d, hn::Set(hn::RebindToUnsigned<D>(), word));
  }
  template <class V>
  static HWY_INLINE V multiply_add(V a, V b, V sum) {
#if HWY_TARGET == HWY_NEON
    // bfdot %0.4s, %1.8h, %2.8h, in numbers: older clangs cannot be told to accept its name.
    asm inline(
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,"
        "31\n\t.equ .Lkeyfold_v\\n,\\n\n\t.endr\n\t"
        ".inst 0x6e40fc00 | .Lkeyfold_%2 << 16 | .Lkeyfold_%1 << 5 | .Lkeyfold_%0"
        : "+w"(sum.raw)
        : "w"(a.raw), "w"(b.raw));
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
#endif
    return sum;
  }
};
#else
#define KEYFOLD_HAS_BF16_PAIRS 0
#endif

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard

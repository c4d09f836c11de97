// What kernels on matrix units share: exponentials, and sums over the four threads that hold a row
// of a product.
#pragma once

#include "common.cuh"

constexpr float kLog2e = 1.44269504f;

KEYFOLD_INLINE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYFOLD_INLINE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEYFOLD_INLINE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
KEYFOLD_INLINE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
// Of `threads` threads, by a number from 1 to 15.
KEYFOLD_INLINE void named_sync(u32 id, u32 threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same, and whether x holds for one of them.
KEYFOLD_INLINE bool named_any(u32 id, u32 threads, bool x) {
  u32 any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 p, %1, 0; barrier.red.or.pred q, %2, %3, p; "
      "selp.u32 %0, 1, 0, q; }"
      : "=r"(any)
      : "r"(u32(x)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}
// As the elements of a word; float32 becomes float16.
KEYFOLD_INLINE u32 pack(float low, float high) {
  u32 r;
  if constexpr (kDType == 2) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}

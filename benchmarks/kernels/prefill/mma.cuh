// What kernels for any GPU from sm_80 on are made of: copies in the background (cp.async), matrices
// from shared memory (ldmatrix), products of a warp (mma.sync).
#pragma once
#include "types.cuh"

// 16 bytes; zeros where `valid` is false: nothing is read then.
DEVICE void copy_16(uint to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint (&r)[4], uint address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
DEVICE void load_transposed(uint (&r)[4], uint address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
DEVICE void load_words(uint (&r)[4], uint address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

#ifdef KF_BFLOAT16
#define KF_MMA_TYPE "bf16"
#else
#define KF_MMA_TYPE "f16"
#endif
// d[16 x 8] += a[16 x 16] * b[16 x 8] of 16-bit elements.
DEVICE void multiply(float* d, const uint (&a)[4], uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KF_MMA_TYPE "." KF_MMA_TYPE
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16 x 8] (+)= a[16 x 8] * b[8 x 8] of tf32 elements: their low 13 bits are ignored.
DEVICE void multiply_tf32(float (&d)[4], const uint (&a)[4], uint b0, uint b1, bool add) {
  const float c0 = add ? d[0] : 0, c1 = add ? d[1] : 0, c2 = add ? d[2] : 0, c3 = add ? d[3] : 0;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
        "f"(c3));
}

// x = high + low, each of tf32's 11 bits. To the nearest: low has either sign, so that the product
// of two lows, which is left out, has no bias. Of |x| > 3.4019e38 high is Inf.
DEVICE void split_nearest(uint x, uint& high, uint& low) {
  high = (x + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}
// Cheaper, for the side that every warp has to split again. Inf and NaN: low is NaN.
DEVICE void split_down(uint x, uint& high, uint& low) {
  high = x & 0xffffe000u;
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}

// What kernels for compute capability 8.0 and later are made of: copies in the background
// (cp.async), matrices from shared memory (ldmatrix), products of a warp (mma.sync).
#pragma once

#include "matrix_units.cuh"

KEYFOLD_INLINE u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}
// 16 bytes; zeros where `valid` is false: nothing is read then.
KEYFOLD_INLINE void copy_16(u32 to, u64 from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
KEYFOLD_INLINE void copy_16(u32 to, u64 from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
KEYFOLD_INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
KEYFOLD_INLINE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
KEYFOLD_INLINE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
KEYFOLD_INLINE void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
KEYFOLD_INLINE void load_shared(u32 (&r)[4], u32 address) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

KEYFOLD_INLINE void store_shared(u32 address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

// d[16 x 8] += a[16 x 16] * b[16 x 8] of 16-bit elements.
#define KEYFOLD_MULTIPLY(type)                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
KEYFOLD_INLINE void multiply(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (kDType == 2) {
    KEYFOLD_MULTIPLY("bf16");
  } else {
    KEYFOLD_MULTIPLY("f16");
  }
}
// d[16 x 8] (+)= a[16 x 8] * b[8 x 8] of tf32 elements: their low 13 bits are ignored.
KEYFOLD_INLINE void multiply_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bool add) {
  const float c0 = add ? d[0] : 0, c1 = add ? d[1] : 0, c2 = add ? d[2] : 0, c3 = add ? d[3] : 0;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2),
        "f"(c3));
}

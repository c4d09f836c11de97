// What kernels for compute capability 9.0 are made of: barriers in shared memory, tensor copies
// (TMA), products of a warpgroup (wgmma). PTX ISA 8.0, sections on mbarrier, cp.async.bulk.tensor,
// wgmma.
#pragma once

#include "matrix_units.cuh"

struct alignas(64) TensorMap {
  char bytes[128];
};

// As threadIdx.x, but read where it stands.
KEYFOLD_INLINE u32 thread_index() {
  u32 index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
KEYFOLD_INLINE u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Barriers, by their shared addresses.
KEYFOLD_INLINE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// After the last barrier_init().
KEYFOLD_INLINE void barriers_are_there() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
KEYFOLD_INLINE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
KEYFOLD_INLINE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
KEYFOLD_INLINE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n .reg .pred p;\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\n bra wait;\n done:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

KEYFOLD_INLINE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
KEYFOLD_INLINE void copy_4d(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
KEYFOLD_INLINE void copy_5d(u32 to, const TensorMap& map, u32 barrier, int x, int y, int z, int w,
                            int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v)
      : "memory");
}
// `bytes`: a multiple of 16, as are the addresses.
KEYFOLD_INLINE void copy_bytes(u32 to, u64 from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// Shared memory written by threads is to be read by products.
KEYFOLD_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Tiles in shared memory: rows of 64 elements (128 bytes, swizzled by 128 bytes), one panel of 64
// columns behind the other; panels begin at multiples of 1024 bytes.
KEYFOLD_INLINE u64 matrix_at(u32 address, u32 panel_bytes) {
  return (u64((address & 0x3ffffu) >> 4)) | (u64(panel_bytes >> 4) << 16) | (u64(1024 >> 4) << 32) |
         (u64(1) << 62);
}

KEYFOLD_INLINE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KEYFOLD_INLINE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
KEYFOLD_INLINE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what it does with accumulators over a wait.
template <int n>
KEYFOLD_INLINE void hold(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n>
KEYFOLD_INLINE void hold(u32 (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

#if KEYFOLD_DTYPE == 2
#define KEYFOLD_TYPE "bf16"
#else
#define KEYFOLD_TYPE "f16"
#endif
#define KEYFOLD_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define KEYFOLD_NAMES16 KEYFOLD_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define KEYFOLD_NAMES32 \
  KEYFOLD_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KEYFOLD_NAMES48 \
  KEYFOLD_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define KEYFOLD_NAMES64 \
  KEYFOLD_NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define KEYFOLD_NAMES80 \
  KEYFOLD_NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define KEYFOLD_NAMES96 \
  KEYFOLD_NAMES80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define KEYFOLD_NAMES128                                                               \
  KEYFOLD_NAMES96                                                                      \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
  "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define KEYFOLD_OUT8(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KEYFOLD_OUT16(i) KEYFOLD_OUT8(i), KEYFOLD_OUT8(i + 8)
#define KEYFOLD_OUTS16 KEYFOLD_OUT16(0)
#define KEYFOLD_OUTS32 KEYFOLD_OUTS16, KEYFOLD_OUT16(16)
#define KEYFOLD_OUTS48 KEYFOLD_OUTS32, KEYFOLD_OUT16(32)
#define KEYFOLD_OUTS64 KEYFOLD_OUTS48, KEYFOLD_OUT16(48)
#define KEYFOLD_OUTS80 KEYFOLD_OUTS64, KEYFOLD_OUT16(64)
#define KEYFOLD_OUTS96 KEYFOLD_OUTS80, KEYFOLD_OUT16(80)
#define KEYFOLD_OUTS128 KEYFOLD_OUTS96, KEYFOLD_OUT16(96), KEYFOLD_OUT16(112)

// d[64 x N] (+)= a * b.
template <int N>
struct Product;
#define KEYFOLD_PRODUCT(N, REGS, I0, I1, I2, I3, I4, I5)                                    \
  template <>                                                                               \
  struct Product<N> {                                                                       \
    /* a and b from shared memory, b transposed as it lies; `add`: else d begins at 0 */    \
    static KEYFOLD_INLINE void of(float (&d)[REGS], u64 a, u64 b, int add) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I2                                   \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KEYFOLD_TYPE     \
                   "." KEYFOLD_TYPE " {" KEYFOLD_NAMES##REGS "}, " I0 ", " I1               \
                                                             ", p, 1, 1, 0, 0;\n}"          \
                   : KEYFOLD_OUTS##REGS                                                     \
                   : "l"(a), "l"(b), "r"(add));                                             \
    }                                                                                       \
    /* a from registers */                                                                  \
    static KEYFOLD_INLINE void add(float (&d)[REGS], const u32* a, u64 b, int add = 1) {    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " I5                                   \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KEYFOLD_TYPE     \
                   "." KEYFOLD_TYPE " {" KEYFOLD_NAMES##REGS "}, {" I0 "," I1 "," I2 "," I3 \
                                                             "}, " I4 ", p, 1, 1, 1;\n}"    \
                   : KEYFOLD_OUTS##REGS                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));         \
    }                                                                                       \
  };
KEYFOLD_PRODUCT(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
KEYFOLD_PRODUCT(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
KEYFOLD_PRODUCT(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
KEYFOLD_PRODUCT(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
KEYFOLD_PRODUCT(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

template <u32 kRegisters>
KEYFOLD_INLINE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <u32 kRegisters>
KEYFOLD_INLINE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

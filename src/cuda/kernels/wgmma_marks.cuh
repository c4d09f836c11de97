// Marks: which keys of a tile the mask shows, by bits in shared memory. Two warps bring those of
// tile after tile; a tile that it hides from all rows of a job is neither copied nor folded.
#pragma once

#include "mask_bits.cuh"
#include "wgmma_jobs.cuh"

constexpr bool kMasked = kMaskType != 0;
constexpr bool kMaskValues = KEYFOLD_MASK_VALUES;  // scores meet the mask, rather than its bits
constexpr u32 kMarkWarps = 2;  // of the producer's warpgroup, the last
constexpr i32 kSplitTiles = kSplitLen / kKeys;
using MarkRing = RingOf<kMasked ? kMarkSlots : 1>;

KEYFOLD_INLINE uint2 read_shared_pair(u32 address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}
KEYFOLD_INLINE void write_shared(u32 address, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
KEYFOLD_INLINE void write_shared(u32 address, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
KEYFOLD_INLINE uint2 read_pair(u64 address) {
  uint2 x;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(address) : "memory");
  return x;
}

// Whether the mask has other values than 0 and -Inf.
KEYFOLD_INLINE bool has_values(const Jobs& jobs) {
  bool other = false;
  for (u32 i = threadIdx.x; i < jobs.blocks; i += kThreads) {
    other = other || read_word(jobs.bits + 4 * i) != 0;
  }
  return __syncthreads_or(other);
}

// Waits for the next tile's marks: whether some row sees some of its keys.
KEYFOLD_INLINE bool await_marks(const MarkRing& ring, u32 base, const Barriers& bars) {
  if (!kMasked) return true;
  barrier_wait(bars.marks_full + 8 * ring.slot, ring.parity);
  const uint2 said = read_shared_pair(base + kSaidAt + 4 * kMarkWarps * ring.slot);
  return (said.x | said.y) != 0;
}
// `speaks`: one thread of each warp that consumes; and those that copy.
KEYFOLD_INLINE void leave_marks(MarkRing& ring, const Barriers& bars, bool speaks = true) {
  if (!kMasked) return;
  if (speaks) barrier_arrive(bars.marks_empty + 8 * ring.slot);
  ring.step();
}

// The side that brings them.
KEYFOLD_INLINE void mark(const Params& p, const Jobs& jobs, const Job* records, u32 base,
                         const Barriers& bars, u32 thread) {
  constexpr u32 kThreadRows = kRows / (32 * kMarkWarps), kPairs = kMarkRow / 8;
  MarkRing ring;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full, i % 2);
    const Job& job = records[i % 2];
    if (job.units == 0) return;
    u32 row_records[kThreadRows];
#pragma unroll
    for (u32 r = 0; r < kThreadRows; ++r) {
      const u32 index = job.first + 32 * kMarkWarps * r + thread;
      row_records[r] = u32(first_record(p, job.group, smaller(index, p.index_end - 1)));
    }
    const u32 rows = 64 * job.units;
    const i32 first = i32(p.split) * kSplitTiles;
    for (i32 pass = 0; pass < kPasses; ++pass) {
      for (i32 n = job.begin; n < job.end; ++n) {
        const u32 split = u32(n - first) / kSplitTiles, tile = u32(n - first) % kSplitTiles;
        uint2 bits[kThreadRows][kPairs];
        u32 any = 0;
#pragma unroll
        for (u32 r = 0; r < kThreadRows; ++r) {
          const bool there = 32 * kMarkWarps * r + thread < rows;
          const u64 record =
              jobs.bits + kRecordsFrom + u64(row_records[r] + split) * kRecordBytes;
#pragma unroll
          for (u32 j = 0; j < kPairs; ++j) {
            bits[r][j] = there ? read_pair(record + tile * kMarkRow + 8 * j) : uint2{0, 0};
            any |= bits[r][j].x | bits[r][j].y;
          }
        }
        barrier_wait(bars.marks_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
        for (u32 r = 0; r < kThreadRows && !kMaskValues; ++r) {
          const u32 row = 32 * kMarkWarps * r + thread;
          const u32 to = base + kMarksAt + ring.slot * kMarkBytes + row * kMarkRow;
#pragma unroll
          for (u32 j = 0; j < kPairs; ++j) write_shared(to + 8 * j, bits[r][j]);
        }
        any = __any_sync(~0u, any != 0) ? 1 : 0;
        if (thread % 32 == 0) {
          write_shared(base + kSaidAt + 4 * (kMarkWarps * ring.slot + thread / 32), any);
        }
        barrier_arrive(bars.marks_full + 8 * ring.slot);
        ring.step();
      }
    }
  }
}

// The marks of two rows of a tile, as a thread that holds part of their scores needs them.
struct Marks {
  u32 of[2][kKeys / 32];

  // `row`, and row + 8.
  KEYFOLD_INLINE void load(const MarkRing& ring, u32 base, u32 row) {
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const u32 from = base + kMarksAt + ring.slot * kMarkBytes + (row + 8 * r) * kMarkRow;
#pragma unroll
      for (u32 j = 0; j < kKeys / 64; ++j) {
        const uint2 pair = read_shared_pair(from + 8 * j);
        of[r][2 * j] = pair.x;
        of[r][2 * j + 1] = pair.y;
      }
    }
  }
  // Scores as scores.cuh has them.
  KEYFOLD_INLINE void hide(float (&s)[kKeys / 2], u32 lane) const {
    u32 all = ~0u;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
#pragma unroll
      for (u32 j = 0; j < kKeys / 32; ++j) all &= of[r][j];
    }
    if (__all_sync(~0u, all == ~0u)) return;
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
#pragma unroll
      for (u32 j = 0; j < kKeys / 32; ++j) {
        const u32 word = of[r][j] >> 2 * (lane % 4);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          float& x = s[4 * (4 * j + i / 2) + 2 * r + i % 2];
          x = (word >> (i / 2 * 8 + i % 2) & 1) != 0 ? x : hidden();
        }
      }
    }
  }
};

// Marks: which keys of a tile the mask shows, by bits in shared memory. Two warps bring those of
// tile after tile, of tiles that some row of the job sees: others are neither copied nor folded.
#pragma once

#include "wgmma_jobs.cuh"

constexpr bool kMasked = kMaskType != 0;
constexpr bool kMaskValues = KEYFOLD_MASK_VALUES;  // scores meet the mask, rather than its bits
constexpr u32 kMarkWarps = 2;                      // of the producer's warpgroup, the last
using MarkRing = RingOf<kMasked ? kMarkSlots : 1>;

KEYFOLD_INLINE u32 read_shared(u32 address) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
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

// The tiles of a job: without a mask all of them, one after the other.
constexpr u32 kNoMore = ~0u;
struct Tile {
  i32 n;
  bool full = true;  // all rows see all keys, as far as the mask goes

  // With a mask only find() knows.
  KEYFOLD_INLINE bool is_one(const Job& job) const { return kMasked || n < job.end; }
  // Waits for the marks of the next one; false behind the last.
  KEYFOLD_INLINE bool find(const MarkRing& ring, u32 base, const Barriers& bars) {
    barrier_wait(bars.marks_full + 8 * ring.slot, ring.parity);
    const u32 said = read_shared(base + kSaidAt + 4 * ring.slot);
    n = i32(said >> 1);
    full = (said & 1) != 0;
    return said != kNoMore;
  }
};
// `speaks`: one thread of each warp that consumes; and those that copy.
KEYFOLD_INLINE void leave_marks(MarkRing& ring, const Barriers& bars, bool speaks = true) {
  if (!kMasked) return;
  if (speaks) barrier_arrive(bars.marks_empty + 8 * ring.slot);
  ring.step();
}

// The side that brings them. Each warp looks for tiles; they bring them in turn.
KEYFOLD_INLINE void mark(const Params& p, const Jobs& jobs, const Job* records, u32 base,
                         const Barriers& bars, u32 warp, u32 lane) {
  constexpr u32 kLaneRows = kRows / 32, kAtOnce = kLaneRows / 2, kPairs = kMarkRow / 8;
  // With one slot the second warp would be two phases of it ahead.
  constexpr u32 kTurns = kMarkSlots > 1 ? kMarkWarps : 1;
  if (warp >= kTurns) return;
  MarkRing ring;
  u32 turn = 0;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full, i % 2);
    const Job& job = records[i % kRecords];
    if (job.units == 0) return;
    if (job.begin == job.end) continue;
    // Rows that are none are as the last.
    u32 row_records[kLaneRows];
#pragma unroll
    for (u32 r = 0; r < kLaneRows; ++r) {
      const u32 index = job.first + smaller(32 * r + lane, 64 * job.units - 1);
      row_records[r] = u32(first_record(p, job.group, smaller(index, p.index_end - 1)));
    }
    // The next entry: what is said of it, and, where asked for, the bits.
    const auto bring = [&](u32 said, bool bits, u32 split, u32 tile) {
      if (turn == warp) {
        barrier_wait(bars.marks_empty + 8 * ring.slot, ring.parity ^ 1);
#pragma unroll
        for (u32 first = 0; first < kLaneRows && bits; first += kAtOnce) {
          uint2 words[kAtOnce][kPairs];
#pragma unroll
          for (u32 r = 0; r < kAtOnce; ++r) {
            const u64 record = u64(row_records[first + r] + split) * kRecordBytes;
            const u64 from = jobs.bits + kRecordsFrom + record + tile * kMarkRow;
#pragma unroll
            for (u32 j = 0; j < kPairs; ++j) words[r][j] = read_pair(from + 8 * j);
          }
#pragma unroll
          for (u32 r = 0; r < kAtOnce; ++r) {
            const u32 row = 32 * (first + r) + lane;
            const u32 to = base + kMarksAt + ring.slot * kMarkBytes + row * kMarkRow;
#pragma unroll
            for (u32 j = 0; j < kPairs; ++j) write_shared(to + 8 * j, words[r][j]);
          }
        }
        if (lane == 0) write_shared(base + kSaidAt + 4 * ring.slot, said);
        barrier_arrive(bars.marks_full + 8 * ring.slot);
      }
      ring.step();
      turn = (turn + 1) % kTurns;
    };
    for (i32 pass = 0; pass < kPasses; ++pass) {
      i32 seen = 0;  // tiles so far
      for (u32 s = 0; seen < job.end; ++s) {
        const uint4 sum = load_words(sum_of(p, jobs, job.number, s));
        const u32 split = kPartial ? job.split : s;  // of the wave
        const u32 any[2] = {sum.x, sum.y}, all[2] = {sum.z, sum.w};
#pragma unroll
        for (u32 w = 0; w < (kSplitTiles > 32 ? 2 : 1); ++w) {
          const i32 count = __popc(any[w]);
          const bool skipped = seen + count <= job.begin;
          if (skipped) seen += count;
          for (u32 left = skipped ? 0 : any[w]; left != 0; left &= left - 1) {
            if (seen++ < job.begin || seen > job.end) continue;
            const u32 bit = u32(__ffs(i32(left)) - 1), tile = 32 * w + bit;
            const u32 n = (p.split + split) * u32(kSplitTiles) + tile;
            const u32 full = all[w] >> bit & 1;
            bring(n << 1 | full, full == 0 && !kMaskValues, split, tile);
          }
        }
      }
      bring(kNoMore, false, 0, 0);
    }
  }
}

// Hides what the marks of two rows, `row` and row + 8, hide, of scores as scores.cuh has them.
KEYFOLD_INLINE void hide_unseen(float (&s)[kKeys / 2], const MarkRing& ring, u32 base, u32 row,
                                u32 lane) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const u32 from = base + kMarksAt + ring.slot * kMarkBytes + (row + 8 * r) * kMarkRow;
#pragma unroll
    for (u32 j = 0; j < kKeys / 64; ++j) {
      const uint2 bits = read_shared_pair(from + 8 * j);
#pragma unroll
      for (u32 i = 0; i < 16; ++i) {
        const u32 word = (i < 8 ? bits.x : bits.y) >> 2 * (lane % 4);
        float& x = s[4 * (8 * j + i / 2) + 2 * r + i % 2];
        x = (word >> (i / 2 % 4 * 8 + i % 2) & 1) != 0 ? x : hidden();
      }
    }
  }
}

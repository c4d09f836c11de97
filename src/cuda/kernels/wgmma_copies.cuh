// The sides of wgmma.cu that copy, and that stand for warpgroups without rows.
#pragma once

#include "wgmma_marks.cuh"

KEYFOLD_INLINE void produce(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                            const Params& p, const Jobs& jobs, const Ends& ends, u32 base,
                            const Barriers& bars, Job* records) {
  Ring ring;
  MarkRing marks;
  u32 q_parity = 1, record = 0;
  const auto next = [&] {  // one is read while the other is written
    barrier_wait(bars.q_empty, q_parity);
    q_parity ^= 1;
    return &records[record++ % 2];
  };
  bool more = true;
  for (u32 i = 0; more; ++i) {
    Job job;
    if (!find_job(p, jobs, i, job, more)) continue;
    *next() = job;
    if (job.begin == job.end) {
      barrier_arrive(bars.q_full);
      continue;
    }
    const u32 batch = job.group / p.kv_heads, kv_head = job.group % p.kv_heads;
    barrier_expect(bars.q_full, job.units * kHeadPanels * kQueryPanel);
    for (u32 w = 0; w < job.units; ++w) {
      for (u32 c = 0; c < kHeadPanels; ++c) {
        // A map of gathered rows has one head, and the groups of the block behind each other.
        const bool there = ends.q.at != 0;
        const u32 index = job.first + 64 * w;
        copy_5d(base + (w * kHeadPanels + c) * kQueryPanel, q_map, bars.q_full, 64 * c, 0,
                there ? index / p.heads : index, there ? kv_head : job.group - p.block_group,
                there ? batch : 0);
      }
    }
    // A tensor that is broadcast over heads or batch entries has one of them.
    const i32 k_head = p.k_head != 0 ? kv_head : 0, k_batch = p.k_batch != 0 ? batch : 0;
    const i32 v_head = p.v_head != 0 ? kv_head : 0, v_batch = p.v_batch != 0 ? batch : 0;
    for (i32 pass = 0; pass < kPasses; ++pass) {
      for (Tile tile{job.begin}; tile.is_one(job); ++tile.n) {
        if constexpr (kMasked) {
          const bool more = tile.find(marks, base, bars);
          leave_marks(marks, bars);
          if (!more) break;
        }
        for (u32 part = 0; part < kKeyParts + kValueParts; ++part) {
          const u32 to = base + kSlotsAt + ring.slot * kSlotBytes, full = bars.full + 8 * ring.slot;
          barrier_wait(bars.empty + 8 * ring.slot, ring.parity ^ 1);
          if (part < kKeyParts) {
            barrier_expect(full, kKeyBytes);
            for (u32 c = 0; c < kPartPanels; ++c) {
              copy_4d(to + c * kKeyPanel, k_map, full, 64 * (part * kPartPanels + c),
                      tile.n * i32(kKeys), k_head, k_batch);
            }
          } else {
            barrier_expect(full, kValueBytes);
            for (u32 c = 0; c < kValuePanels; ++c) {
              copy_4d(to + c * kValuePanel, v_map, full, 64 * c,
                      tile.n * i32(kKeys) + (part - kKeyParts) * kPartKeys, v_head, v_batch);
            }
          }
          ring.step();
        }
      }
    }
  }
  next()->units = 0;
  barrier_arrive(bars.q_full);
}

// Lets slots go for warpgroups that have no rows.
KEYFOLD_INLINE void release(u32 base, const Barriers& bars, const Job* records) {
  Ring ring;
  MarkRing marks;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full, i % 2);
    const Job job = records[i % 2];
    if (job.units == 0) return;
    const u32 absent = kWarpgroups - job.units;
    const auto arrive = [&](u32 barrier, u32 times) {
      for (u32 j = 0; j < times; ++j) barrier_arrive(barrier);
    };
    arrive(bars.q_empty, absent);
    if (job.begin == job.end) continue;
    for (Tile tile{job.begin}; tile.is_one(job); ++tile.n) {
      if constexpr (kMasked) {
        const bool more = tile.find(marks, base, bars);
        arrive(bars.marks_empty + 8 * marks.slot, 4 * absent);  // four warps each; and this thread
        leave_marks(marks, bars);
        if (!more) break;
      }
      for (u32 part = 0; part < kKeyParts + kValueParts; ++part) {
        barrier_wait(bars.full + 8 * ring.slot, ring.parity);
        arrive(bars.empty + 8 * ring.slot, absent);
        ring.step();
      }
    }
  }
}

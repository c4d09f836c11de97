// The sides of wgmma.cu that copy, and that stand for warpgroups without rows.
#pragma once

#include "wgmma_biases.cuh"
#include "wgmma_shares.cuh"

// Waits for what a warpgroup of another block leaves at a cut.
KEYFOLD_INLINE void await_part(const Jobs& jobs, u32 cut, u32 warpgroup) {
  const u64 flag = cut_flag_of(jobs, cut, warpgroup);
  u32 there;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
  } while (there == 0);
  write_word(flag, 0);  // for the next launch
}

// Hands the i-th job out, with its rows of q: to a warpgroup as soon as it is done with those
// before, so that the warpgroups need not be in step. `units` 0: there is none.
KEYFOLD_INLINE void hand_out(const Job& job, u32 i, const TensorMap& q_map, const Params& p,
                             const Jobs& jobs, const Ends& ends, u32 base, const Barriers& bars,
                             Job* records) {
  // A map of gathered rows has one head, and the groups of the block behind each other.
  const bool there = ends.q.at != 0;
  for (u32 w = 0; w < kWarpgroups; ++w) {
    const u32 full = bars.q_full + 8 * w;
    barrier_wait(bars.q_empty + 8 * w, i % 2 ^ 1);
    if (w == 0) records[i % kRecords] = job;  // all are done with the one that was there
    if (kCuts && job.units != 0 && job.from != 0) await_part(jobs, job.from - 1, w);
    if (w >= job.units || job.begin == job.end) {
      barrier_arrive(full);
      continue;
    }
    barrier_expect(full, kHeadPanels * kQueryPanel);
    const u32 index = job.first + 64 * w;
    for (u32 c = 0; c < kHeadPanels; ++c) {
      copy_5d(base + (w * kHeadPanels + c) * kQueryPanel, q_map, full, 64 * c, 0,
              there ? index / p.heads : index,
              there ? job.group % p.kv_heads : job.group - p.block_group,
              there ? job.group / p.kv_heads : 0);
    }
  }
}

// Copies the keys and values of a job, as far ahead as there are slots.
KEYFOLD_INLINE void copy_keys(const Job& job, const TensorMap& k_map, const TensorMap& v_map,
                              const TensorMap& mask_map, const Params& p, u32 base,
                              const Barriers& bars, Ring& ring, MarkRing& marks, BiasRing& biases) {
  if (job.begin == job.end) return;
  const u32 batch = job.group / p.kv_heads, kv_head = job.group % p.kv_heads;
  // A tensor that is broadcast over heads or batch entries has one of them.
  const i32 k_head = p.k_head != 0 ? kv_head : 0, k_batch = p.k_batch != 0 ? batch : 0;
  const i32 v_head = p.v_head != 0 ? kv_head : 0, v_batch = p.v_batch != 0 ? batch : 0;
  const auto next = [&](u32 bytes) {  // the next slot, when it is empty
    const u32 full = bars.full + 8 * ring.slot;
    barrier_wait(bars.empty + 8 * ring.slot, ring.parity ^ 1);
    barrier_expect(full, bytes);
    return full;
  };
  const auto put_keys = [&](i32 n) {
    for (u32 part = 0; part < kKeyParts; ++part) {
      const u32 full = next(kKeyBytes), to = base + kSlotsAt + ring.slot * kSlotBytes;
      for (u32 c = 0; c < kPartPanels; ++c) {
        copy_4d(to + c * kKeyPanel, k_map, full, 64 * (part * kPartPanels + c), n * i32(kKeys),
                k_head, k_batch);
      }
      ring.step();
    }
  };
  const auto put_values = [&](i32 n) {
    for (u32 part = 0; part < kValueParts; ++part) {
      const u32 full = next(kValueBytes), to = base + kSlotsAt + ring.slot * kSlotBytes;
      for (u32 c = 0; c < kValuePanels; ++c) {
        copy_4d(to + c * kValuePanel, v_map, full, 64 * c, n * i32(kKeys) + part * kPartKeys,
                v_head, v_batch);
      }
      ring.step();
    }
  };
  if constexpr (kAhead) {
    put_keys(job.begin);
    for (i32 n = job.begin; n < job.end; ++n) {
      if (n + 1 < job.end) put_keys(n + 1);
      put_values(n);
    }
    return;
  }
  for (i32 pass = 0; pass < kPasses; ++pass) {
    for (Tile tile{job.begin}; tile.is_one(job); ++tile.n) {
      if constexpr (kMasked) {
        const bool more = tile.find(marks, base, bars);
        leave_marks(marks, bars);
        if (!more) break;
      }
      put_keys(tile.n);
      if (kBiased) copy_biases(job, tile.n, mask_map, p, base, bars, biases);
      put_values(tile.n);
    }
  }
}

// The threads that copy: one for all, where other warps bring marks, else one for q and another
// for keys and values, which need not wait for warpgroups to be done with q.
KEYFOLD_INLINE void produce(bool queries, bool keys, const TensorMap& q_map, const TensorMap& k_map,
                            const TensorMap& v_map, const TensorMap& mask_map, const Params& p,
                            const Jobs& jobs, const Ends& ends, u32 base, const Barriers& bars,
                            Job* records, const Share& share) {
  Ring ring;
  MarkRing marks;
  BiasRing biases;
  Queue queue{share};
  for (u32 i = 0;; ++i) {
    Job job;
    if (!queue.next(p, jobs, job)) job.units = 0;
    if (queries) hand_out(job, i, q_map, p, jobs, ends, base, bars, records);
    if (job.units == 0) return;
    if (keys) copy_keys(job, k_map, v_map, mask_map, p, base, bars, ring, marks, biases);
  }
}

// Lets slots go for warpgroups that have no rows.
KEYFOLD_INLINE void release(u32 base, const Barriers& bars, const Job* records) {
  Ring ring;
  MarkRing marks;
  BiasRing biases;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full + 8 * (kWarpgroups - 1), i % 2);  // handed out last
    const Job job = records[i % kRecords];
    if (job.units == 0) return;
    const u32 absent = kWarpgroups - job.units;
    const auto arrive = [&](u32 barrier, u32 times) {
      for (u32 j = 0; j < times; ++j) barrier_arrive(barrier);
    };
    for (u32 w = job.units; w < kWarpgroups; ++w) barrier_arrive(bars.q_empty + 8 * w);
    if (job.begin == job.end) continue;
    for (Tile tile{job.begin}; tile.is_one(job); ++tile.n) {
      if constexpr (kMasked) {
        const bool more = tile.find(marks, base, bars);
        arrive(bars.marks_empty + 8 * marks.slot, 4 * absent);  // four warps each; and this thread
        leave_marks(marks, bars);
        if (!more) break;
      }
      for (u32 part = 0; kBiased && part < kBiasParts; ++part) {
        barrier_wait(bars.biases_full + 8 * biases.slot, biases.parity);
        arrive(bars.biases_empty + 8 * biases.slot, 4 * absent);
        biases.step();
      }
      for (u32 part = 0; part < kKeyParts + kValueParts; ++part) {
        barrier_wait(bars.full + 8 * ring.slot, ring.parity);
        arrive(bars.empty + 8 * ring.slot, absent);
        ring.step();
      }
    }
  }
}

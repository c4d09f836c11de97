// What the two sides of wgmma.cu agree on: tiles, shared memory, jobs. And the side that copies.
#pragma once

#include "hopper.cuh"
#include "results.cuh"

constexpr bool kCareful = KEYFOLD_CAREFUL;
constexpr u32 kKeys = KEYFOLD_KEYS;              // of a tile
constexpr u32 kWarpgroups = KEYFOLD_WARPGROUPS;  // that consume
constexpr bool kPartial = KEYFOLD_PARTIAL;
constexpr bool kEnded = KEYFOLD_ENDED;  // rows begin empty, and results are written
constexpr u32 kSlots = KEYFOLD_SLOTS;   // of the ring
constexpr u32 kRows = 64 * kWarpgroups, kConsumers = 128 * kWarpgroups;
static_assert(kThreads == kConsumers + 128 && kSplitLen % kKeys == 0, "as in kernel_shape.hpp");
// Panels of 64 columns.
constexpr u32 kHeadPanels = (kHeadDim + 63) / 64, kValuePanels = (kValueDim + 63) / 64;
constexpr u32 kHeadWidth = 64 * kHeadPanels, kValueWidth = 64 * kValuePanels;
// A part of K is some panels of a tile; a part of V is some of its keys.
constexpr u32 kPartPanels = KEYFOLD_PART_PANELS, kPartKeys = KEYFOLD_PART_KEYS;
constexpr u32 kKeyParts = kHeadPanels / kPartPanels, kValueParts = kKeys / kPartKeys;
static_assert(kHeadPanels % kPartPanels == 0 && kKeys % kPartKeys == 0 && kPartKeys % 16 == 0);
// Bytes.
constexpr u32 kQueryPanel = 64 * 128, kKeyPanel = kKeys * 128, kValuePanel = kPartKeys * 128;
constexpr u32 kKeyBytes = kPartPanels * kKeyPanel, kValueBytes = kValuePanels * kValuePanel;
constexpr u32 kSlotBytes = larger(kKeyBytes, kValueBytes);
// Shared memory: q, slots, barriers, two jobs.
constexpr u32 kSlotsAt = kWarpgroups * kHeadPanels * kQueryPanel;
constexpr u32 kBarriersAt = kSlotsAt + kSlots * kSlotBytes;
constexpr u32 kRecordsAt = kBarriersAt + 16 * (kSlots + 1);
// Scores become weights in steps: products of one with V run beside exponentials of the next.
constexpr u32 kWeighings = KEYFOLD_WEIGHINGS, kSteps = kKeys / 16 / kWeighings;
constexpr i32 kPasses = kCareful ? 4 : 1;

// Weights are taken times 2^kWeightBits: float16 holds those down to 2^-39.
constexpr float kWeightBits = kDType == 2 ? 0.0f : 15.0f;
constexpr float kWeightUnit = kDType == 2 ? 1.0f : 1.0f / 32768.0f;

// What a launch works on.
struct Jobs {
  u64 redo;    // u32 [jobs][kWarpgroups]: whether the careful kernel has to
  u32 groups;  // of the chunk
  u32 tiles;   // of rows, in each
  u32 small;   // of these, the first, which have
  u32 units;   // as many warpgroups' rows; the others have rows of all
};

// --- Jobs ---------------------------------------------------------------------------------------

// One tile of rows of one group, and the tiles of keys that it meets: those of a split, or all. The
// producer looks for it; others find it in shared memory, which costs them no registers.
struct Job {
  u32 group, first;  // absolute; index of the first row
  u32 split;         // of the wave
  u32 units;         // warpgroups that have rows; 0: there is no more to do
  u32 number;        // of its flags
  i32 begin, end;    // tiles of keys; none: its rows see nothing
  Range full;        // keys that all its rows see
};
KEYFOLD_INLINE u64 flag_of(const Jobs& jobs, const Job& job, u32 warpgroup) {
  return jobs.redo + 4 * (job.number * kWarpgroups + warpgroup);
}

// Whether there is something to do in the i-th round; `more`: in that or a later one. Jobs with
// many keys begin first, and every second round goes the other way, so that all blocks get about
// the same work; those of fewer rows come last. Tiles that meet one split do so at a time.
KEYFOLD_INLINE bool find_job(const Params& p, const Jobs& jobs, u32 i, Job& job, bool& more) {
  const u32 within = i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const u32 at = i * gridDim.x + within, parts = jobs.groups * (kPartial ? p.num_splits : 1);
  more = i * gridDim.x < parts * jobs.tiles;
  if (at >= parts * jobs.tiles) return false;
  const u32 tile = kPartial ? at % jobs.tiles : jobs.tiles - 1 - at / parts;
  const u32 part = kPartial ? at / jobs.tiles : at % parts;
  job.split = part / jobs.groups;
  job.group = p.group + part % jobs.groups;
  job.units = tile < jobs.small ? jobs.units : kWarpgroups;
  const u32 before = tile < jobs.small
                         ? tile * jobs.units
                         : jobs.small * jobs.units + (tile - jobs.small) * kWarpgroups;
  job.first = p.index_begin + 64 * before;
  job.number = at;
  const Batch seen = load_batch(p, job.group / p.kv_heads);
  const u32 last = smaller(job.first + 64 * job.units, p.index_end) - 1;
  Range early = visible(seen, job.first / p.heads), late = visible(seen, last / p.heads);
  job.full = {late.begin, early.end};
  if (kPartial) {
    const i32 from = (p.split + job.split) * kSplitLen;
    early.begin = larger(early.begin, from);
    late.end = smaller(late.end, from + i32(kSplitLen));
  }
  job.begin = early.begin / i32(kKeys);
  job.end = (late.end + i32(kKeys) - 1) / i32(kKeys);
  if (early.begin >= late.end) {
    job.begin = job.end = 0;
    return !kCareful && (kPartial || kEnded);  // else what is in memory stays
  }
  if (!kCareful) return true;
  u32 any = 0;
  for (u32 w = 0; w < job.units; ++w) any |= read_word(flag_of(jobs, job, w));
  return any != 0;
}

// --- The producer -------------------------------------------------------------------------------

struct Barriers {  // full and empty: one a slot
  u32 q_full, q_empty, full, empty;
};
KEYFOLD_INLINE Barriers barriers_at(u32 at) { return {at, at + 8, at + 16, at + 16 + 8 * kSlots}; }
// A place in the ring of slots.
struct Ring {
  u32 slot = 0, parity = 0;
  KEYFOLD_INLINE void step() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

KEYFOLD_INLINE void produce(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                            const Params& p, const Jobs& jobs, const Ends& ends, u32 base,
                            const Barriers& bars, Job* records) {
  Ring ring;
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
      for (i32 n = job.begin; n < job.end; ++n) {
        for (u32 part = 0; part < kKeyParts + kValueParts; ++part) {
          const u32 to = base + kSlotsAt + ring.slot * kSlotBytes, full = bars.full + 8 * ring.slot;
          barrier_wait(bars.empty + 8 * ring.slot, ring.parity ^ 1);
          if (part < kKeyParts) {
            barrier_expect(full, kKeyBytes);
            for (u32 c = 0; c < kPartPanels; ++c) {
              copy_4d(to + c * kKeyPanel, k_map, full, 64 * (part * kPartPanels + c), n * kKeys,
                      k_head, k_batch);
            }
          } else {
            barrier_expect(full, kValueBytes);
            for (u32 c = 0; c < kValuePanels; ++c) {
              copy_4d(to + c * kValuePanel, v_map, full, 64 * c,
                      n * kKeys + (part - kKeyParts) * kPartKeys, v_head, v_batch);
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
KEYFOLD_INLINE void release(const Barriers& bars, const Job* records) {
  Ring ring;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full, i % 2);
    const Job job = records[i % 2];
    if (job.units == 0) return;
    const auto arrive = [&](u32 barrier) {
      for (u32 w = job.units; w < kWarpgroups; ++w) barrier_arrive(barrier);
    };
    arrive(bars.q_empty);
    const i32 parts = (job.end - job.begin) * i32(kKeyParts + kValueParts);
    for (i32 part = 0; part < parts; ++part) {
      barrier_wait(bars.full + 8 * ring.slot, ring.parity);
      arrive(bars.empty + 8 * ring.slot);
      ring.step();
    }
  }
}

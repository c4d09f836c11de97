// What the sides of wgmma.cu agree on: tiles, shared memory, barriers, jobs.
#pragma once

#include "hopper.cuh"
#include "mask_bits.cuh"
#include "results.cuh"

constexpr bool kCareful = KEYFOLD_CAREFUL;
constexpr u32 kWarpgroups = KEYFOLD_WARPGROUPS;  // that consume
constexpr bool kPartial = KEYFOLD_PARTIAL;
constexpr bool kEnded = KEYFOLD_ENDED;          // rows begin empty, and results are written
constexpr u32 kSlots = KEYFOLD_SLOTS;           // of the ring
constexpr u32 kMarkSlots = KEYFOLD_MARK_SLOTS;  // of the ring of marks; 0 without a mask
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
// Of a mask's values, where they come through shared memory: panels of 128 bytes of each row that
// a tile has, and some of a tile's panels in a slot: see wgmma_biases.cuh.
constexpr u32 kBiasSlots = KEYFOLD_BIAS_SLOTS, kBiasParts = KEYFOLD_BIAS_PARTS;
constexpr u32 kBiasRows = KEYFOLD_BIAS_ROWS, kBiasSize = kMaskType == 2 ? 4 : 2;
constexpr u32 kBiasPanel = (kBiasRows + 7) / 8 * 1024;
constexpr u32 kBiasPanels = kKeys * kBiasSize / 128 / kBiasParts, kBiasKeys = 128 / kBiasSize;
constexpr u32 kBiasBytes = kBiasPanels * kBiasPanel;
constexpr u32 kMarkRow = kKeys / 8, kMarkBytes = kBiasSlots != 0 ? 0 : kRows * kMarkRow;
// Shared memory: q, slots, biases, marks, barriers, jobs, what is said of the marks.
constexpr u32 kSlotsAt = kWarpgroups * kHeadPanels * kQueryPanel;
constexpr u32 kBiasesAt = kSlotsAt + kSlots * kSlotBytes;
constexpr u32 kMarksAt = kBiasesAt + kBiasSlots * kBiasBytes;
constexpr u32 kBarriersAt = kMarksAt + kMarkSlots * kMarkBytes;
constexpr u32 kRecordsAt = kBarriersAt + 16 * (kSlots + kMarkSlots + kBiasSlots + kWarpgroups);
constexpr u32 kRecords = 4;  // jobs: one is begun while another ends, and two are between
// Scores become weights in steps: products of one with V run beside exponentials of the next.
constexpr u32 kWeighings = KEYFOLD_WEIGHINGS, kSteps = kKeys / 16 / kWeighings;
constexpr i32 kPasses = kCareful ? 4 : 1;
constexpr bool kCuts = !kCareful && !kPartial;  // whether jobs can be cut along the keys
// Whether a warpgroup has the products of the next tile's scores done beside those with V of this
// one: where two warpgroups have registers for weights of one beside scores of the other.
constexpr bool kAhead = kWarpgroups == 2 && kValuePanels <= 2 && kMaskType == 0 && !kCareful;
static_assert(!kAhead || kKeyParts + kValueParts <= kSlots, "full at once");

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
  u64 bits;    // of the mask: see mask_bits.cuh
  u32 blocks;  // that have made them
  u32 cut;     // jobs, the last, that blocks share: see wgmma_shares.cuh
  u64 parts;   // states at the cuts
  u64 sums;    // what mask_jobs.cu has found out of the bits
  u32 length;  // tiles of keys of each job, where all have the same; else 0
};

struct Barriers {  // one a warpgroup, and one a slot
  u32 q_full, q_empty, full, empty, marks_full, marks_empty, biases_full, biases_empty;
};
KEYFOLD_INLINE Barriers barriers_at(u32 at) {
  const u32 full = at + 16 * kWarpgroups, marks = full + 16 * kSlots;
  const u32 biases = marks + 16 * kMarkSlots;
  return {at,    at + 8 * kWarpgroups,   full,   full + 8 * kSlots,
          marks, marks + 8 * kMarkSlots, biases, biases + 8 * kBiasSlots};
}
// A place in a ring of slots.
template <u32 kCount>
struct RingOf {
  u32 slot = 0, parity = 0;
  KEYFOLD_INLINE void step() {
    if (++slot == kCount) slot = 0, parity ^= 1;
  }
};
using Ring = RingOf<kSlots>;

// --- Jobs ---------------------------------------------------------------------------------------

// One tile of rows of one group, and the tiles of keys that it meets: those of a split, or all. The
// producer looks for it; others find it in shared memory, which costs them no registers.
struct Job {
  u32 group, first;  // absolute; index of the first row
  u32 split;         // of the wave
  u32 units;         // warpgroups that have rows; 0: there is no more to do
  u32 number;        // of its flags
  u32 from, to;      // cuts where it goes on and where it is left, by their numbers + 1; 0: none
  // Tiles of keys; none: its rows see nothing. With a mask those that it sees are counted, from 0.
  i32 begin, end;
  Range full;  // keys that all its rows see, but for masks
};
constexpr u32 kSaidAt = kRecordsAt + kRecords * sizeof(Job);
KEYFOLD_INLINE u64 flag_of(const Jobs& jobs, const Job& job, u32 warpgroup) {
  return jobs.redo + 4 * (job.number * kWarpgroups + warpgroup);
}

// Whether a warpgroup has left its part at a cut.
KEYFOLD_INLINE u64 cut_flag_of(const Jobs& jobs, u32 cut, u32 warpgroup) {
  return jobs.parts + 4 * (cut * kWarpgroups + warpgroup);
}

KEYFOLD_INLINE u32 number_of_jobs(const Params& p, const Jobs& jobs) {
  return jobs.groups * jobs.tiles * (kPartial ? p.num_splits : 1);
}
// A job by its number, masks left aside; false where its rows see nothing.
KEYFOLD_INLINE bool whole_job_at(const Params& p, const Jobs& jobs, u32 at, Job& job) {
  const u32 tile = at % jobs.tiles, part = at / jobs.tiles;
  job.split = part / jobs.groups;
  job.group = p.group + part % jobs.groups;
  job.units = tile < jobs.small ? jobs.units : kWarpgroups;
  const u32 before = tile < jobs.small
                         ? tile * jobs.units
                         : jobs.small * jobs.units + (tile - jobs.small) * kWarpgroups;
  job.first = p.index_begin + 64 * before;
  job.number = at;
  job.from = job.to = 0;
  const Batch seen = load_batch(p, job.group / p.kv_heads);
  const u32 last = smaller(job.first + 64 * job.units, p.index_end) - 1;
  Range early = visible(seen, job.first / p.heads), late = visible(seen, last / p.heads);
  job.full = {late.begin, early.end};
  if (kPartial || kMaskType != 0) {  // waves of parts of the keys
    const u32 first = p.split + (kPartial ? job.split : 0), count = kPartial ? 1 : p.num_splits;
    early.begin = larger(early.begin, i32(first * kSplitLen));
    late.end = smaller(late.end, i32((first + count) * kSplitLen));
  }
  const bool sees = early.begin < late.end;
  job.begin = sees ? early.begin / i32(kKeys) : 0;
  job.end = sees ? (late.end + i32(kKeys) - 1) / i32(kKeys) : 0;
  return sees;
}

// What is known of a mask's tiles: of each split of a job, which tiles some of its rows see, and
// which all of them see whole (64 bits each); then of each job how many it sees.
constexpr u32 kSumBytes = 16;
KEYFOLD_INLINE u32 splits_of_job(const Params& p) { return kPartial ? 1 : p.num_splits; }
KEYFOLD_INLINE u64 sum_of(const Params& p, const Jobs& jobs, u32 at, u32 split) {
  return jobs.sums + (u64(at) * splits_of_job(p) + split) * kSumBytes;
}
KEYFOLD_INLINE u64 count_of(const Params& p, const Jobs& jobs, u32 at) {
  return sum_of(p, jobs, number_of_jobs(p, jobs), 0) + u64(4) * at;
}

// A job by its number; false where nothing is to be done.
KEYFOLD_INLINE bool job_at(const Params& p, const Jobs& jobs, u32 at, Job& job) {
  bool sees = whole_job_at(p, jobs, at, job);
  if (kMaskType != 0) {
    job.begin = 0, job.end = i32(read_word(count_of(p, jobs, at)));
    sees = job.end != 0;
  }
  if (!sees) return !kCareful && (kPartial || kEnded);  // else what is in memory stays
  if (!kCareful) return true;
  u32 any = 0;
  for (u32 w = 0; w < job.units; ++w) any |= read_word(flag_of(jobs, job, w));
  return any != 0;
}

// The work of wgmma3.cu: its shape, its jobs, and the warp that copies their tiles.
#pragma once

#include "pairs.cuh"

constexpr u32 kWarpgroups = KEYFOLD_WARPGROUPS;  // that consume
constexpr u32 kStages = KEYFOLD_STAGES;          // of K and V in turn
constexpr bool kPartial = KEYFOLD_PARTIAL;    // a partial state of each split, from the empty one
constexpr bool kFinished = KEYFOLD_FINISHED;  // scores are more than products times the scale
constexpr u32 kRows = 64 * kWarpgroups;
static_assert(kThreads == 128 * (kWarpgroups + 1), "as in the host's");
// Shared memory: q as pairs, the stages, their records, barriers.
constexpr u32 kQueryPanel = 64 * 128, kQueryPart = kHeadPanels * kQueryPanel;
constexpr u32 kStagesAt = kWarpgroups * 2 * kQueryPart;
constexpr u32 kStageBytes = 2 * larger(kHeadPart, kValuePart);
constexpr u32 kRecordsAt = kStagesAt + kStages * kStageBytes;
constexpr u32 kBarriersAt = kRecordsAt + kStages * kRecordBytes;
constexpr u32 kHeadSteps = (kHeadDim + 15) / 16;
// Columns of a product with V; of one key's weights.
constexpr u32 kColumns = kValueWidth % 128 == 0 ? 128 : 64;
constexpr float kWeightUnit = 1.0f / (1 << kWeightBits);

// --- Jobs ---------------------------------------------------------------------------------------

// One tile of rows of one group, and the tiles of keys that it meets.
struct Job {
  u32 group, first;  // absolute; index of the first row
  u32 batch, kv_head;
  u32 split;       // of the wave, where they go apart
  i32 begin, end;  // tiles of keys
  Range full;      // keys that all its rows see
  Batch seen;
  u64 pairs;  // the group's tile 0 of keys, were it of the wave
  bool skip;
};

// The i-th job of this block; false behind the last. Jobs with many keys begin first, and every
// second round goes the other way, so that all blocks get about the same work.
KEYFOLD_INLINE bool job_of(const Params& p, const Jobs& jobs, u32 i, Job& job) {
  const u32 within = i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const u32 at = i * gridDim.x + within;
  const u32 splits = kPartial ? p.num_splits : 1, of_tile = splits * jobs.groups;
  job.skip = at >= of_tile * jobs.tiles;
  if (job.skip) return i * gridDim.x < of_tile * jobs.tiles;
  const u32 tile = jobs.tiles - 1 - at / of_tile, group = at / splits % jobs.groups;
  job.split = at % splits;
  job.group = p.group + group;
  job.first = p.index_begin + tile * kRows;
  job.batch = job.group / p.kv_heads;
  job.kv_head = job.group % p.kv_heads;
  job.seen = load_batch(p, job.batch);
  const i32 wave_begin = i32(p.split * kSplitTiles), wave_tiles = i32(p.num_splits * kSplitTiles);
  job.pairs = jobs.pairs + (i64(group) * wave_tiles - wave_begin) * kTileBytes;
  const u32 last = smaller(job.first + kRows, p.index_end) - 1;
  const Range early = visible(job.seen, job.first / p.heads),
              late = visible(job.seen, last / p.heads);
  const i32 first_tile = wave_begin + i32(job.split * kSplitTiles);
  const i32 end_tile = kPartial ? first_tile + i32(kSplitTiles) : wave_begin + wave_tiles;
  job.begin = larger(early.begin / i32(kKeys), first_tile);
  job.end = smaller((late.end + i32(kKeys) - 1) / i32(kKeys), end_tile);
  job.full = {late.begin, early.end};
  job.skip = !kPartial && job.begin >= job.end;
  return true;
}

// --- The producer -------------------------------------------------------------------------------

// A place in the ring of stages.
struct Ring {
  u32 stage = 0, parity = 0;
  KEYFOLD_INLINE void step() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};
struct Barriers {  // one a stage
  u32 full, empty;
};

KEYFOLD_INLINE void produce(const Params& p, const Jobs& jobs, u32 base, const Barriers& bars) {
  Ring ring;
  const auto copy = [&](u64 from, u32 bytes, u32 record_bytes) {
    const u32 full = bars.full + 8 * ring.stage;
    barrier_wait(bars.empty + 8 * ring.stage, ring.parity ^ 1);
    barrier_expect(full, bytes + record_bytes);
    copy_bytes(base + kStagesAt + ring.stage * kStageBytes, from, bytes, full);
    if (record_bytes != 0) {
      copy_bytes(base + kRecordsAt + ring.stage * kRecordBytes, from + bytes, record_bytes, full);
    }
    ring.step();
  };
  Job job;
  for (u32 i = 0; job_of(p, jobs, i, job); ++i) {
    if (job.skip) continue;
#pragma unroll 1
    for (i32 n = job.begin; n < job.end; ++n) {
      const u64 tile = job.pairs + u64(n) * kTileBytes;
      copy(tile, 2 * kHeadPart, kRecordBytes);
      copy(tile + kValuesAt, 2 * kValuePart, 0);
    }
  }
}

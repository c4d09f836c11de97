// Prefill of float32 on Hopper (compute capability 9.0) by float16 products: with a = a_high +
// a_low, a b = a_low b_high + a_high b_low + a_high b_high, and what is left out is below float32's
// last bit. K and V come as pairs already (pairs.cu); a producer copies tiles of them; each
// consumer warpgroup folds them into its 64 rows, and computes softmax while others' products run.
//
// Tensor cores round sums toward zero, which adds up to a bias: so sums of many products are kept
// short, with the small products first; a tile's product with V is added to the output by rounding
// to nearest.
//
// The fold goes on from the state in memory, tile of keys after tile of keys, counted from key 0,
// so that the end of a chunk changes nothing; or, where the rows are few, it begins anew for each
// split, and a merge follows. Tiles that no row sees are left out.
//
// Weights are taken times what V's key was divided by, and m is the largest score after that: so
// keys whose values differ in scale by orders of magnitude meet in one product. What no pair can
// hold (Inf and NaN among it) is found by its bit in the record, and is computed in float32, for
// each row and key that it concerns and for no other.
#include "wgmma3_fold.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    wgmma3(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared);
  const Barriers bars{base + kBarriersAt, base + kBarriersAt + 8 * kStages};
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < 8 * kStages; i += 8) {
      barrier_init(bars.full + i, 1);
      barrier_init(bars.empty + i, 4 * kWarpgroups);
    }
    barriers_are_there();
  }
  __syncthreads();

  // All registers: 40 and 2 x 232, or 32 and 3 x 160, of 128 threads each.
  if (threadIdx.x < 128) {
    give_registers<kWarpgroups == 3 ? 32 : 40>();
    if (threadIdx.x == 0) produce(p, jobs, base, bars);
    return;
  }
  take_registers<kWarpgroups == 3 ? 160 : 232>();
  const u32 consumer = threadIdx.x - 128, warpgroup = consumer / 128, lane = consumer % 32;
  const u32 row = consumer / 32 * 16 + lane / 4;  // of the tile; and row + 8
  const u32 q = base + warpgroup * 2 * kQueryPart;
  const bool leader = lane == 0;  // of a warp

  Ring ring;
  Rows c;
  Job job;
  for (u32 i = 0; job_of(p, jobs, i, job); ++i) {
    if (job.skip) continue;
    u64 state[2];
    bool inside[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const u32 index = job.first + row + 8 * r;
      inside[r] = index < p.index_end;
      const u32 at = smaller(index, p.index_end - 1);
      c.seen[r] = visible(job.seen, at / p.heads);
      state[r] = state_index(p, job.group, at);
      c.q[r] = p.q + 4 * kHeadDim * state[r];
      if (kMaskType != 0) c.mask[r] = mask_address(p, job.batch, job.group, at);
    }
    named_sync(1 + warpgroup, 128);  // all have done with q
    load_queries(c, p, inside, q, row, lane);
    fence_async();
    named_sync(1 + warpgroup, 128);
    if constexpr (kPartial) {
      empty_state(c);
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 index = smaller(job.first + row + 8 * r, p.index_end - 1);
        state[r] = partial_index(p, job.group - p.group, job.split, index);
      }
    } else {
      load_state(c, p, state, lane);
    }

    for (i32 n = job.begin; n < job.end; ++n) {
      if (n * i32(kKeys) % i32(kSplitLen) == 0) close_split(c);
      const u32 k = base + kStagesAt + ring.stage * kStageBytes;
      const u32 record = base + kRecordsAt + ring.stage * kRecordBytes;
      const u32 k_empty = bars.empty + 8 * ring.stage;
      barrier_wait(bars.full + 8 * ring.stage, ring.parity);
      ring.step();
      compute_scores(c, q, k);
      scale_scores(c, record, lane);
      odd_scores(c, p, job, n, record, lane);
      finish_scores(c, p, job, n, record, lane);
      float alpha[2];
      softmax(c, record, lane, alpha);
      const uint2 odd = shared_bits(record + kOddValuesAt);
      __syncwarp();  // all have read the record
      if (leader) barrier_arrive(k_empty);
      pack_weights(c);
      rescale(c, alpha);
      odd_values(c, p, job, n, odd, lane);

      const u32 v = base + kStagesAt + ring.stage * kStageBytes;
      const u32 v_empty = bars.empty + 8 * ring.stage;
      barrier_wait(bars.full + 8 * ring.stage, ring.parity);
      ring.step();
      add_values(c, v);
      if (leader) barrier_arrive(v_empty);
    }
    close_split(c);
    store_state(c, kPartial ? p.partial_o : p.o, kPartial ? p.partial_ml : p.ml, state, inside,
                lane);
  }
}

// Prefill on Hopper (compute capability 9.0), for float16 and bfloat16. A producer warp copies
// tiles of K and V by TMA, in parts that take turns in a ring of slots; each consumer warpgroup
// folds them into its 64 rows by wgmma, one step behind the other; the products of one run while
// another computes exponentials (FlashAttention-3: Shah et al., 2024), with no order between them.
// Two warpgroups have registers for more: wgmma_ahead.cuh.
//
// The fold goes on from the state in memory, tile of keys after tile of keys, counted from key 0,
// so that the end of a chunk changes nothing; where a launch meets all keys of its rows, it takes
// these to their end itself (KEYFOLD_ENDED). Tiles that no row sees would change nothing either,
// and are left out. With KEYFOLD_PARTIAL, for calls of few rows, each split of keys is folded on
// its own, from the empty state to a partial state.
//
// Inf and NaN of V have no place in a product, where 0 times them would be NaN. Where the output is
// not finite, the state stays as it is and the job is left to the same kernel with KEYFOLD_CAREFUL,
// which meets the keys four times: with 1 where V is Inf, -Inf, NaN, and then with the rest of V.
//
// A mask comes as bits (wgmma_marks.cuh). Where it has other values than 0 and -Inf, another kernel
// takes the launch's place, to which the copy engine brings values (wgmma_biases.cuh), or which
// reads the mask itself, where that cannot; the bits of results are the same.
#include "wgmma_ahead.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    wgmma(const __grid_constant__ Params p, const __grid_constant__ TensorMap q_map,
          const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
          const __grid_constant__ TensorMap mask_map, const __grid_constant__ Jobs jobs,
          const __grid_constant__ Ends ends) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 base = shared_address(shared);
  const Barriers bars = barriers_at(base + kBarriersAt);
  Job* const records = reinterpret_cast<Job*>(shared + kRecordsAt);
  if (kCareful) {
    // Most often nothing is left, which all threads see sooner than one.
    await_previous();
    bool left = false;
    for (u32 at = threadIdx.x; at < number_of_jobs(p, jobs); at += kThreads) {
      Job job;
      left = left || job_at(p, jobs, at, job);
    }
    if (!__syncthreads_or(left)) return;
  } else {
    launch_next();
  }
  if (!kCareful && kMaskType > 1 && has_values(jobs) != kMaskValues) return;
  const bool releases = !kCareful && jobs.small != 0;
  Share share{};
  if (kCuts && jobs.cut != 0) share = find_share(p, jobs, shared);
  if (threadIdx.x == 0) {
    for (u32 w = 0; w < 8 * kWarpgroups; w += 8) {
      barrier_init(bars.q_full + w, 1);
      barrier_init(bars.q_empty + w, 1);
    }
    for (u32 i = 0; i < 8 * kSlots; i += 8) {
      barrier_init(bars.full + i, 1);
      barrier_init(bars.empty + i, kWarpgroups);
    }
    for (u32 i = 0; i < 8 * kMarkSlots; i += 8) {
      barrier_init(bars.marks_full + i, 32);
      barrier_init(bars.marks_empty + i, 4 * kWarpgroups + 1 + (releases ? 1 : 0));
    }
    for (u32 i = 0; i < 8 * kBiasSlots; i += 8) {
      barrier_init(bars.biases_full + i, 1);
      barrier_init(bars.biases_empty + i, 4 * kWarpgroups);
    }
    barriers_are_there();
    if (kBiased) prefetch_map(mask_map);
    prefetch_map(q_map);
    prefetch_map(k_map);
    prefetch_map(v_map);
  }
  __syncthreads();

  // The same for all threads of a warp, and known to be.
  const u32 role = __shfl_sync(~0u, threadIdx.x / 128, 0);
  // All registers: 40 and 2 x 232, or 32 and 3 x 160, of 128 threads each.
  if (role == 0) {
    give_registers<kWarpgroups == 3 ? 32 : 40>();
    const auto copy = [&](bool queries, bool keys) {
      produce(queries, keys, q_map, k_map, v_map, mask_map, p, jobs, ends, base, bars, records,
              share);
    };
    // Each in a warp of its own.
    if (threadIdx.x == 0) copy(kMasked, true);
    if (threadIdx.x == 32 && releases) release(base, bars, records);
    if (threadIdx.x == 64 && !kMasked) copy(true, false);
    constexpr u32 kFirst = 128 - 32 * kMarkWarps;
    if (kMasked && threadIdx.x >= kFirst) {
      mark(p, jobs, records, base, bars, (threadIdx.x - kFirst) / 32, threadIdx.x % 32);
    }
    return;
  }
  take_registers<kWarpgroups == 3 ? 160 : 232>();
  const u32 consumer = threadIdx.x - 128, warpgroup = role - 1, lane = consumer % 32;
  const u32 row = consumer / 32 * 16 + lane / 4;  // of the tile; and row + 8
  const u32 q = base + warpgroup * kHeadPanels * kQueryPanel;
  const bool leader = consumer % 128 == 0;

  Ring ring;
  MarkRing marks;
  BiasRing biases;
  Rows c;
  for (u32 i = 0;; ++i) {
    barrier_wait(bars.q_full + 8 * warpgroup, i % 2);
    const Job& job = records[i % kRecords];
    // Jobs of fewer rows come last. A careful kernel's warpgroups need each other.
    if (kCareful ? job.units == 0 : warpgroup >= job.units) break;
    // All of the warpgroup are done with the job before.
    named_sync(4 + warpgroup, 128);
    const bool blind = job.begin == job.end;
    u64 state[2];
    bool inside[2];
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
      const u32 index = job.first + row + 8 * r;
      inside[r] = index < p.index_end;
      const u32 at = smaller(index, p.index_end - 1);
      state[r] = state_of(p, job, at);
      if (kBiased) c.bias_place[r] = bias_place(bias_row(p, job, at), lane);
      if (kMaskValues && !kBiased)
        c.mask[r] = mask_address(p, job.group / p.kv_heads, job.group, at);
    }
    if (kPartial && blind) {
      for (u32 r = 0; r < 2; ++r) {
        if (inside[r] && lane % 4 == 0) write(ml_of(p, state[r]), float2{hidden(), -1.0f});
      }
    }
    if (blind && leader) barrier_arrive(bars.q_empty + 8 * warpgroup);
    if (kPartial && blind) continue;

    [[maybe_unused]] i32 split = 0;                  // of the tile before
    u32 odds[kCareful ? kValueWidth / 16 : 1] = {};  // four bits an element: those of the passes
    for (i32 pass = kPasses - 1; pass >= 0; --pass) {
      // Slots are free when the products with what is in them are done.
      const auto give = [&](Ring used, u32 parts) {
#pragma unroll
        for (u32 part = 0; part < parts; ++part) {
          if (leader) barrier_arrive(bars.empty + 8 * used.slot);
          used.step();
        }
      };
      // The next slot, when it is full.
      const auto take = [&] {
        const u32 slot = ring.slot;
        barrier_wait(bars.full + 8 * slot, ring.parity);
        ring.step();
        return base + kSlotsAt + slot * kSlotBytes;
      };

      load_state(c, p, state, pass, lane);
      if (kCuts && job.from != 0) resume(c, jobs, job.from - 1, split);
      if constexpr (kAhead) {
        if (!blind) fold_ahead(c, p, job, row, q, ring, bars, lane, leader, warpgroup, take, give);
      }
      for (Tile tile{job.begin}; !kAhead && (!kMasked || !blind) && tile.is_one(job); ++tile.n) {
        const auto let_marks_go = [&] {
          if (kMasked) __syncwarp();
          leave_marks(marks, bars, lane == 0);
        };
        if constexpr (kMasked) {
          if (!tile.find(marks, base, bars)) {
            let_marks_go();
            break;
          }
          if (tile.n / kSplitTiles != split) close_split(c);
          split = tile.n / kSplitTiles;
        }
        const i32 n = tile.n;
        const Ring keys = ring;
        hold(c.s);
#pragma unroll
        for (u32 part = 0; part < kKeyParts; ++part) issue_scores(c, q, take(), part);
        products_commit();
        products_wait<0>();
        hold(c.s);
        give(keys, kKeyParts);
        if (!kMasked && pass == 0 && n + 1 == job.end && leader)
          barrier_arrive(bars.q_empty + 8 * warpgroup);

        finish_scores(c, p, job, row, tile, biases, base, bars, lane);
        if (kMasked && !kMaskValues && !tile.full) hide_unseen(c.s, marks, base, row, lane);
        let_marks_go();
        const Step step = raise_maxima(c, p);
        const Ring values = ring;
        u32 v = 0;
#pragma unroll
        for (u32 w = 0; w < kWeighings; ++w) {
          weigh(c, p, step, pass, w);
          pack_weights(c, pass, w);
          // A careful kernel has no registers for weights of one step beside scores of the next.
          if (kCareful && w + 1 < kWeighings) continue;
          hold(c.o);
          hold(c.w);
#pragma unroll
          for (u32 i = kCareful ? 0 : w * kSteps; i < (w + 1) * kSteps; ++i) {
            if (i * 16 % kPartKeys == 0) {
              v = take();
              if (kCareful) transform_values(v, pass, consumer);
            }
            if (i * 16 % kPartKeys == 0 || i % kSteps == 0) products_begin();
            issue_values(c, v, i);
          }
          products_commit();
        }
        if (!kMasked && (n + 1) % kSplitTiles == 0) close_split(c);
        products_wait<0>();
        hold(c.o);
        give(values, kValueParts);
      }
      if (job.to == 0 && (kMasked || job.end % kSplitTiles != 0)) close_split(c);
      // Only behind the last tile it is known that there is none.
      if (kMasked && !blind && pass == 0 && leader) barrier_arrive(bars.q_empty + 8 * warpgroup);

      if (kCareful && pass != 0) {
#pragma unroll
        for (u32 j = 0; j < kValueWidth / 2; ++j) {
          odds[j / 8] |= c.o[j] > 0.0f ? 1u << (4 * (j % 8) + pass) : 0;
        }
      }
    }

    if (kCuts && job.to != 0) {
      leave(c, jobs, job.to - 1, split);
      continue;
    }
    bool write = true;
    if constexpr (kCareful) {
#pragma unroll
      for (u32 j = 0; j < kValueWidth / 2; ++j) {
        const u32 mark = odds[j / 8] >> 4 * (j % 8) & 15;
        if (mark != 0) c.o[j] += mark == 2 ? -hidden() : mark == 4 ? hidden() : nan();
      }
      write = warpgroup < job.units && read_word(flag_of(jobs, job, warpgroup)) != 0;
    } else {
      write = !any_odd(c, warpgroup);
      if (leader) write_word(flag_of(jobs, job, warpgroup), write ? 0 : 1);
    }
    if (write) {
      if constexpr (kEnded) {
        store_results(c, p, ends, job, row, lane);
      } else {
        store_state(c, p, state, inside, lane);
      }
    }
  }
}

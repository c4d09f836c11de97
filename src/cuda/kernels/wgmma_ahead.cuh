// How a warpgroup of wgmma.cu folds tiles where it has registers for weights of one tile beside
// scores of the next: the products of those scores run ahead of the products with V, and the
// latter beside exponentials (FlashAttention-3: Shah et al., 2024). The bits are those of the other
// loop: each sum meets the same numbers in the same order.
#pragma once

#include "wgmma_fold.cuh"

// The tiles of a job that has some. `take` and `give`: slots, as in wgmma.cu.
template <class Take, class Give>
KEYFOLD_INLINE void fold_ahead(Rows& c, const Params& p, const Job& job, u32 row, u32 q,
                               const Ring& ring, const Barriers& bars, u32 lane, bool leader,
                               u32 warpgroup, const Take& take, const Give& give) {
  Step step;
  Ring keys;
  const auto begin_scores = [&] {
    keys = ring;
    hold(c.s);
#pragma unroll
    for (u32 part = 0; part < kKeyParts; ++part) issue_scores(c, q, take(), part);
    products_commit();
  };
  // Scores of tile n, whose products are done, become weights.
  const auto end_scores = [&](i32 n) {
    hold(c.s);
    give(keys, kKeyParts);
    if (n + 1 == job.end && leader) barrier_arrive(bars.q_empty + 8 * warpgroup);
    BiasRing none;
    finish_scores(c, p, job, row, Tile{n}, none, 0, bars, lane);
    step = raise_maxima(c, p);
#pragma unroll
    for (u32 w = 0; w < kWeighings; ++w) weigh(c, p, step, 0, w);
    hold(c.s);
  };
  // The outputs are of the maxima before until the products with them are done.
  const auto pack_all = [&] {
    rescale_outputs(c, step, 0);
#pragma unroll
    for (u32 w = 0; w < kWeighings; ++w) pack_weights(c, 0, w);
  };
  const auto begin_values = [&] {
    u32 v = 0;
    hold(c.o);
    hold(c.w);
    products_begin();
#pragma unroll
    for (u32 i = 0; i < kKeys / 16; ++i) {
      if (i * 16 % kPartKeys == 0) v = take();
      issue_values(c, v, i);
    }
    products_commit();
  };
  const auto end_values = [&](const Ring& values) {
    products_wait<0>();
    hold(c.o);
    hold(c.w);
    give(values, kValueParts);
  };

  begin_scores();
  products_wait<0>();
  end_scores(job.begin);
  pack_all();
  i32 n = job.begin;
  for (; n + 1 < job.end; ++n) {
    begin_scores();
    const Ring values = ring;
    begin_values();
    if ((n + 1) % kSplitTiles == 0) close_split(c);
    products_wait<1>();
    end_scores(n + 1);
    // The next part, which is waited for anyway: keeps the compiler from moving exponentials behind
    // the wait for products.
    barrier_wait(bars.full + 8 * ring.slot, ring.parity);
    end_values(values);
    pack_all();
  }
  const Ring values = ring;
  begin_values();
  if ((n + 1) % kSplitTiles == 0) close_split(c);
  end_values(values);
}

// Decode of 16-bit keys from compute capability 8.0 on: few query rows against many keys. What
// counts is that memory is never idle; products by mma.sync, for which the rows of a group (up to
// 16) share each key, are there to take few instructions.
//
// A unit of work is a tile of rows of one group against kUnitLen keys. Blocks stay, each walks over
// a range of units. Its streams (a warp, or a team of warps that share keys and divide rows or
// columns of values) take steps of keys in turn, each through a ring of shared memory of its own
// that cp.async keeps full across units: the block meets at a unit's end only (decode_combine.cuh).
// What it leaves decode_merge.cu folds. No answer from memory is waited for but that of the ring,
// as it would come behind all that is under way.
#include "decode_combine.cuh"
#include "decode_products.cuh"
#include "results.cuh"

// Queries stay in registers where these are enough.
constexpr bool kQueryShared = kHeadWidth / 4 + kWidth / 2 > 160;

// --- Products -----------------------------------------------------------------------------------

KEYFOLD_INLINE void mark_values(unsigned char* tile, Mode mode, u32 team_lane) {
  for (u32 i = team_lane; i < kStep * ValueTile::kPitch / 4; i += 32 * kTeam) {
    u32* const at = reinterpret_cast<u32*>(tile) + i;
    *at = mark_of(*at & 0xffffu, mode) | mark_of(*at >> 16, mode) << 16;
  }
}
// What sums of marks say of o, two bits an element; a word of a thread's lies every kThreads words.
KEYFOLD_INLINE void keep_odd(const float (&sums)[kWidth / 2], u32* odd) {
  u32 words[kOddWords] = {};
#pragma unroll
  for (u32 i = 0; i < kWidth / 2; ++i) {
    words[i / 16] |= odd_code(sums[i]) << (2 * (i % 16));
  }
  for (u32 i = 0; i < kOddWords; ++i) odd[i * kThreads] = words[i];
}
KEYFOLD_INLINE void put_odd(const u32* odd, float (&o)[kWidth / 2]) {
#pragma unroll
  for (u32 i = 0; i < kWidth / 2; ++i) {
    const u32 code = odd[i / 16 * kThreads] >> (2 * (i % 16)) & 3;
    if (code != 0) o[i] = odd_value(code);
  }
}
// Whether a row that is not all NaN holds Inf or NaN.
KEYFOLD_INLINE bool has_odd(const Fold& c) {
  float zeros[2] = {};  // or NaN
#pragma unroll
  for (u32 i = 0; i < kWidth / 2; ++i) zeros[i / 2 % 2] = fmaf(c.o[i], 0.0f, zeros[i / 2 % 2]);
  const bool rows[2] = {is_nan(quad_sum(c.sums[0].t[0])), is_nan(quad_sum(c.sums[0].t[1]))};
  return (is_nan(zeros[0]) && !rows[0]) || (is_nan(zeros[1]) && !rows[1]);
}
// Products become weights, o as of the new maxima. `seen(r)`: keys that row r sees.
template <class Seen>
KEYFOLD_INLINE void soften(Fold& c, const Params& p, i32 key, u32 lane, Mode mode,
                           float (&s)[1][kStep / 2], const Seen& seen) {
  const bool edge = key < c.full.begin || key + kStep > c.full.end;
  if (kFinished || edge) {
    finish_scores(s[0], p, c.mask, key + 2 * i32(lane % 4), edge, p.softcap, seen);
  }
  float alpha[1][2];
  softmax(s, c.sums, p, alpha);
  // A factor of 1 changes nothing.
  if (mode != kMarks && __any_sync(~0u, alpha[0][0] != 1.0f || alpha[0][1] != 1.0f)) {
#pragma unroll
    for (i32 i = 0; i < kWidth / 2; ++i) c.o[i] *= alpha[0][i / 2 % 2];
  }
}

// o += weights v.
template <class Values>
KEYFOLD_INLINE void multiply_values(Fold& c, const float (&s)[kStep / 2], Mode mode,
                                    const Values& values) {
#pragma unroll
  for (i32 n = 0; n < kStep / 16; ++n) {
    u32 a[4];
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
      const float* const of = s + 8 * n + 2 * i;
      a[i] = pack(weight_in(mode, of[0]), weight_in(mode, of[1]));
    }
#pragma unroll
    for (i32 i = 0; i < kWidth / 16; ++i) {
      u32 x[4];
      values(i, n, x);
      multiply(c.o + 8 * i, a, x[0], x[1]);
      multiply(c.o + 8 * i + 4, a, x[2], x[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, KEYFOLD_RESIDENT)
    decode_mma(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs,
               const __grid_constant__ Ends ends) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 base = shared_address(shared);
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 stream = warp / kTeam, member = warp % kTeam, team_lane = member * 32 + lane;
  const u32 row_member = member / kColumnTeam, column_member = member % kColumnTeam;
  const auto team_sync = [&] {
    if (kTeam == 1) {
      __syncwarp();
    } else {
      named_sync(1 + stream, 32 * kTeam);
    }
  };
  const auto team_any = [&](bool x) {
    return kTeam == 1 ? __any_sync(~0u, x) != 0 : named_any(1 + stream, 32 * kTeam, x);
  };
  if (kPadded) {
    for (u32 i = threadIdx.x; i < kLeftAt / 16; i += kThreads) {
      reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
    }
    __syncthreads();
  }

  u32* const odd = reinterpret_cast<u32*>(shared + kOddAt) + threadIdx.x;
  if (threadIdx.x == 0) Waiting{shared}.levels() = 0;
  Cursor c = begin_of(p, jobs, stream, lane);
  if (c.left == 0) return;
  // Copies run kSlots slots ahead of what is used.
  Cursor ahead = c;
  u64 ahead_k, ahead_v;  // of the step, this lane's part
  i32 ahead_rows;        // that are there, from the step on
  const u32 ring = base + stream * kSlots * kSlotBytes, ring_end = ring + kSlots * kSlotBytes;
  u32 fill = ring, take = ring;
  const auto next = [&](u32& slot) {
    slot += kSlotBytes;
    if (slot == ring_end) slot = ring;
  };
  const auto aim = [&] {
    const i32 key = key_of(p, ahead, stream, ahead.step);
    ahead_rows = ahead.left == 0 ? 0 : ahead.seen.limit - key;
    ahead_k = HeadCopier::begin(
        p.k + ahead.batch * p.k_batch + ahead.head * p.k_head + key * p.k_key, p.k_key, team_lane);
    ahead_v = ValueCopier::begin(
        p.v + ahead.batch * p.v_batch + ahead.head * p.v_head + key * p.v_key, p.v_key, team_lane);
  };
  const auto seek = [&] {
#pragma unroll 1
    while (ahead.left != 0 && ahead.step == ahead.end) advance(p, ahead, stream);
    aim();
  };
  // Commits since queries were asked for; and on top, which half of their memory holds those of
  // now.
  constexpr u32 kHalf = u32(1) << 31;
  u32 since = 0;
  const auto commit = [&] {
    copies_commit();
    ++since;
    next(fill);
  };
  const auto fill_keys = [&] {
    if (ahead_rows >= kStep) {
      HeadCopier::copy<true>(fill, ahead_k, p.k_key, kStep, team_lane);
    } else if (ahead_rows > 0) {
      HeadCopier::copy<false>(fill, ahead_k, p.k_key, ahead_rows, team_lane);
    }
    commit();
  };
  const auto fill_values = [&] {
    if (ahead_rows >= kStep) {
      ValueCopier::copy<true>(fill, ahead_v, p.v_key, kStep, team_lane);
    } else if (ahead_rows > 0) {
      ValueCopier::copy<false>(fill, ahead_v, p.v_key, ahead_rows, team_lane);
    }
    commit();
    if (++ahead.step < ahead.end) {
      ahead_rows -= kStreams * kStep;
      ahead_k += kStreams * kStep * p.k_key;
      ahead_v += kStreams * kStep * p.v_key;
    } else if (ahead.left != 0) {
      seek();
    }
  };
  // Queries come through the same copies, a tile ahead: an answer from memory that is waited for
  // takes as long as all that is under way.
  const auto fill_queries = [&](const Cursor& of, u32 half) {
    const u32 first = tile_first(p, of.tile), last = tile_last(p, of.tile);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < kRows * kHeadWords; i += kThreads) {
      const u32 tile_row = i / kHeadWords, word = i % kHeadWords;
      const u32 index = smaller(first + tile_row, last), row = row_of(p, index);
      const u64 from = ends.q.at == 0
                           ? p.q + 2 * kHeadDim * state_index(p, of.group, index)
                           : address_of(ends.q, of.batch, of.head, index - row * p.heads, row);
      copy_16(base + kQueryAt + half * kQueryBytes + HeadTile::at(tile_row, word), from + 16 * word,
              true);
    }
    since &= kHalf;
  };
  fill_queries(c, 1);
  seek();

  const u32 near = lane % 16, far = lane / 16 * 8 + lane % 8;
  const MatrixRows<HeadTile> query_rows(near, lane / 16), key_rows(far, lane / 8 % 2);
  const MatrixRows<ValueTile> value_rows(near, lane / 16);
  u32 q[kQueryShared ? 1 : kHeadWidth / 16][4];
  const auto shared_query = [&](i32 i, u32(&a)[4]) {
    const u32 rows = since / kHalf * kQueryBytes + 16 * row_member * HeadTile::kPitch;
    load_matrices(a, query_rows.at(base + kQueryAt + rows, i, 0));
  };
  const auto query = [&](i32 i, u32(&a)[4]) {
    if (kQueryShared) {
      shared_query(i, a);
    } else {
      for (u32 e = 0; e < 4; ++e) a[e] = q[kQueryShared ? 0 : i][e];
    }
  };
  Fold fold;
  u32 group = ~0u, tile = 0;  // whose q is here
  bool refill = true;         // copies are to begin
#pragma unroll 1
  for (; c.left != 0; advance(p, c, stream)) {
    const u32 first = tile_first(p, c.tile), last = tile_last(p, c.tile);
    // Rows beyond the last are computed as this, and not written.
    const auto index_of = [&](u32 r) {
      return smaller(first + 16 * row_member + lane / 4 + 8 * r, last);
    };
    Mode mode = kFast;
#pragma unroll 1
    for (;;) {
      if (refill) {
        refill = false;
        fill = take = ring;
#pragma unroll 1
        for (i32 i = 0; i < kSlots / 2; ++i) {
          fill_keys();
          fill_values();
        }
        if (kSlots % 2 != 0) fill_keys();
      }
      if (group != c.group || tile != c.tile) {
        since ^= kHalf;
        group = c.group;
        tile = c.tile;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
          fold.mask[r] = kMaskType == 0 ? 0 : mask_address(p, c.batch, c.group, index_of(r));
        }
        fold.full = {visible(c.seen, row_of(p, last)).begin, visible(c.seen, row_of(p, first)).end};
        if ((since & ~kHalf) >= kSlots) {
          copies_wait<kSlots - 1>();
        } else {
          copies_wait<0>();
        }
        __syncthreads();
        if (!kQueryShared) {
#pragma unroll
          for (i32 i = 0; i < kHeadWidth / 16; ++i) shared_query(i, q[kQueryShared ? 0 : i]);
        }
        Cursor coming = c;
        if (next_turn(p, coming, stream)) fill_queries(coming, 1 - since / kHalf);
      }
      fold.sums[0] = {{hidden(), hidden()}, {0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
      for (i32 i = 0; i < kWidth / 2; ++i) fold.o[i] = 0.0f;
#pragma unroll 1
      for (i32 step = c.step; step < c.end; ++step) {
        float s[1][kStep / 2];
        copies_wait<kSlots - 1>();
        team_sync();
        multiply_keys(s[0], query,
                      [&](i32 i, i32 n, u32(&x)[4]) { load_matrices(x, key_rows.at(take, i, n)); });
        next(take);
        team_sync();  // all have read the slot
        if (kSlots % 2 == 0) {
          fill_keys();
        } else {
          fill_values();
        }
        soften(fold, p, key_of(p, c, stream, step), lane, mode, s,
               [&](u32 r) { return visible(c.seen, row_of(p, index_of(r))); });
        copies_wait<kSlots - 1>();
        team_sync();
        if (mode != kFast) {
          mark_values(shared + (take - base), mode, team_lane);
          team_sync();
        }
        const u32 values = take + 2 * kWidth * column_member;
        multiply_values(fold, s[0], mode, [&](i32 i, i32 n, u32(&x)[4]) {
          load_transposed(x, value_rows.at(values, i, n));
        });
        next(take);
        team_sync();
        if (kSlots % 2 == 0) {
          fill_values();
        } else {
          fill_keys();
        }
      }
      if (mode == kFinite || (mode == kFast && !team_any(has_odd(fold)))) break;
      if (mode == kMarks) keep_odd(fold.o, odd);
      mode = mode == kFast ? kMarks : kFinite;
      copies_wait<0>();
      team_sync();
      ahead = c;
      aim();
      refill = true;
    }
    if (mode == kFinite) put_odd(odd, fold.o);
    combine(fold, p, c, shared, warp, lane);
  }
}

// Decode of few keys in one launch, from compute capability 9.0 on: the bits of decode_mma.cu and
// decode_merge.cu, sooner.
//
// There a stream's keys of a unit, a leaf of the tree of states, are one warp's work, step after
// step. Here they are a block's: a warp for each step of scores, then, the maxima exchanged, one
// for some columns of values each. The blocks of a group are a cluster (x; groups are y), which
// share out its leaves in order; each result is made by lanes that read the leaves of a block each
// from its shared memory.
#include "decode_products.cuh"
#include "decode_results.cuh"

constexpr u32 kMostLeaves = KEYFOLD_LEAVES;  // of a block, one after the other
constexpr u32 kTileRows = KEYFOLD_TILE_ROWS;
constexpr u32 kLeavesOfSplit = kUnits * kStreams;
constexpr i32 kLeafSteps = kUnitLen / (kStep * kStreams);
static_assert(kThreads == 32 * kLeafSteps && kTeam == 1, "as in kernel_shape.hpp");
constexpr u32 kQuads = kValueDim / 4;
constexpr u32 kLeftPitch = kValueWidth + 8;  // floats: rows begin in different banks

// Shared memory.
constexpr u32 kQueryAt = 0;
constexpr u32 kWeightsAt = round_up(kRows * HeadTile::kPitch, 128);  // float4 [steps][step / 8][32]
constexpr u32 kPackedAt = kWeightsAt + kLeafSteps * kStep * 64;      // uint4 [steps][step / 16][32]
constexpr u32 kMaximaAt = kPackedAt + kLeafSteps * kStep * 32;       // [steps][kRows]
constexpr u32 kFactorsAt = kMaximaAt + kLeafSteps * kRows * 4;       // of o before: [steps][kRows]
constexpr u32 kStatesAt = kFactorsAt + kLeafSteps * kRows * 4;       // (m, l) [leaves][kTileRows]
constexpr u32 kLeftAt = kStatesAt + kMostLeaves * kTileRows * 8;     // o [leaves][kTileRows]
constexpr u32 kRingAt = round_up(kLeftAt + kMostLeaves * kTileRows * kLeftPitch * 4, 128);
constexpr u32 kPartBytes = kLeafSteps * kSlotBytes;  // K of a leaf, or V
static_assert(kRingAt + kSlots * kPartBytes == KEYFOLD_SHARED, "as in kernel_shape.hpp");

KEYFOLD_INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// What another block of the cluster has there.
KEYFOLD_INLINE u32 address_in(u32 peer, u32 address) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(peer));
  return there;
}
KEYFOLD_INLINE float2 read_peer_float2(u32 address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(address)
               : "memory");
  return x;
}
KEYFOLD_INLINE float4 read_peer_float4(u32 address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Leaves of a block where `peers` blocks share those of so many keys: a power of two.
KEYFOLD_INLINE u32 leaves_of(u32 num_keys, u32 peers) {
  const u32 units = (num_keys + kUnitLen - 1) / kUnitLen;
  const u32 each = (units * kStreams + peers - 1) / peers;
  return each <= 1 ? 1 : 1u << (32 - __clz(each - 1));
}

// A leaf's first key, and its steps that some row may see.
struct Leaf {
  i32 key, begin, end;
};
KEYFOLD_INLINE Leaf leaf_of(u32 leaf, Range seen) {
  const i32 unit = i32(leaf / kStreams), stream = i32(leaf % kStreams);
  const i32 first = unit * kUnitLen, skipped = kStreams - 1 - stream;
  const i32 begin = larger(0, seen.begin - first), end = smaller(kUnitLen, seen.end - first);
  Leaf at{first + stream * kStep, (begin / kStep + skipped) / kStreams, 0};
  if (begin < end) at.end = ((end + kStep - 1) / kStep + skipped) / kStreams;
  return at;
}

KEYFOLD_INLINE Sum shuffled_down(const Sum& x, u32 lanes) {
  return {{__shfl_down_sync(~0u, x.ml.x, lanes), __shfl_down_sync(~0u, x.ml.y, lanes)},
          {__shfl_down_sync(~0u, x.o.x, lanes), __shfl_down_sync(~0u, x.o.y, lanes),
           __shfl_down_sync(~0u, x.o.z, lanes), __shfl_down_sync(~0u, x.o.w, lanes)}};
}

// What a block has of a leaf for who multiplies weights and values: this lane's part.
struct Weights {
  const float4* all;     // [steps][step / 8][32]
  const uint4* packed;   // [steps][step / 16][32]
  const float* factors;  // of o before the step, of row lane / 4: [steps][kRows]
};
// o = weights v, of 16 columns; `values`: where this lane's matrix row lies. Not kFast: of marks,
// or of what is finite; that is seldom.
template <Mode kMode>
KEYFOLD_INLINE void multiply_values(float (&o)[8], const Weights& w, u32 values) {
  constexpr i32 kAtOnce = kMode == kFast ? kLeafSteps : 1;
#pragma unroll
  for (u32 i = 0; i < 8; ++i) o[i] = 0.0f;
#pragma unroll kAtOnce
  for (u32 step = 0; step < kLeafSteps; ++step) {
    if (kMode != kMarks) {
      const float alpha[2] = {w.factors[step * kRows], w.factors[step * kRows + 8]};
#pragma unroll
      for (u32 i = 0; i < 8; ++i) o[i] *= alpha[i / 2 % 2];
    }
#pragma unroll
    for (u32 n = 0; n < kStep / 16; ++n) {
      u32 a[4], x[4];
      load_transposed(x, values + step * kSlotBytes + 16 * n * ValueTile::kPitch);
      if (kMode == kMarks) {
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const float4 y = w.all[(step * (kStep / 8) + 2 * n + e) * 32];
          a[2 * e] = pack(weight_in(kMode, y.x), weight_in(kMode, y.y));
          a[2 * e + 1] = pack(weight_in(kMode, y.z), weight_in(kMode, y.w));
        }
      } else {
        const uint4 y = w.packed[(step * (kStep / 16) + n) * 32];
        a[0] = y.x, a[1] = y.y, a[2] = y.z, a[3] = y.w;
      }
      if (kMode != kFast) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          x[e] = mark_of(x[e] & 0xffffu, kMode) | mark_of(x[e] >> 16, kMode) << 16;
        }
      }
      multiply(o, a, x[0], x[1]);
      multiply(o + 4, a, x[2], x[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, KEYFOLD_RESIDENT)
    decode_cluster(const __grid_constant__ Params p, const __grid_constant__ Ends ends) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 base = shared_address(shared);
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, step = warp;
  const u32 peers = gridDim.x, leaves = leaves_of(p.num_keys, peers);
  const u32 group = p.group + blockIdx.y, batch = group / p.kv_heads;
  const u32 kv_head = group - batch * p.kv_heads, last = p.index_end - 1;
  const Batch batch_seen = load_batch(p, batch);
  const Range early = visible(batch_seen, row_of(p, p.index_begin));
  const Range late = visible(batch_seen, row_of(p, last));
  const Range seen{early.begin, late.end}, full{late.begin, early.end};
  const u32 first_leaf = blockIdx.x * leaves;

  if (kPadded) {
    for (u32 i = threadIdx.x; i < kWeightsAt / 16; i += kThreads) {
      reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
    }
    for (u32 i = threadIdx.x; i < smaller<u32>(2 * leaves, kSlots) * kPartBytes / 16;
         i += kThreads) {
      reinterpret_cast<uint4*>(shared + kRingAt)[i] = {0, 0, 0, 0};
    }
    __syncthreads();
  }

  // Part 2 i is K of the block's leaf i, part 2 i + 1 its V.
  const auto slot_of = [&](u32 part) { return base + kRingAt + part % kSlots * kPartBytes; };
  const u64 k = p.k + batch * p.k_batch + kv_head * p.k_head;
  const u64 v = p.v + batch * p.v_batch + kv_head * p.v_head;
  // This warp's step of a part. What no row sees is zero in V, so that its weights, 0, add nothing.
  const auto fetch = [&](u32 part) {
    const Leaf leaf = leaf_of(first_leaf + part / 2, seen);
    const bool any = part < 2 * leaves && leaf.begin < leaf.end;
    const bool mine = i32(step) >= leaf.begin && i32(step) < leaf.end;
    const i32 key = leaf.key + i32(step) * kStreams * kStep;
    const i32 rows = any && mine ? batch_seen.limit - key : 0;
    const u32 at = slot_of(part) + step * kSlotBytes;
    if (part % 2 == 0) {
      const u64 from = HeadCopier::begin(k + key * p.k_key, p.k_key, lane);
      if (rows >= kStep) {
        HeadCopier::copy<true>(at, from, p.k_key, kStep, lane);
      } else if (rows > 0) {
        HeadCopier::copy<false>(at, from, p.k_key, rows, lane);
      }
    } else {
      const u64 from = ValueCopier::begin(v + (rows > 0 ? key : 0) * p.v_key, p.v_key, lane);
      if (rows >= kStep) {
        ValueCopier::copy<true>(at, from, p.v_key, kStep, lane);
      } else if (any) {
        ValueCopier::copy<false>(at, from, p.v_key, rows, lane);
      }
    }
    copies_commit();
  };
#pragma unroll 1
  for (u32 j = threadIdx.x; j < kRows * kHeadWords; j += kThreads) {
    const u32 index = smaller(p.index_begin + j / kHeadWords, last), word = j % kHeadWords;
    const u32 row = row_of(p, index);
    const u64 from = ends.q.at == 0
                         ? p.q + 2 * kHeadDim * state_index(p, group, index)
                         : address_of(ends.q, batch, kv_head, index - row * p.heads, row);
    copy_16(base + kQueryAt + HeadTile::at(j / kHeadWords, word), from + 16 * word);
  }
#pragma unroll 1
  for (u32 part = 0; part < kSlots; ++part) fetch(part);

  const u32 near = lane % 16, far = lane / 16 * 8 + lane % 8;
  const MatrixRows<HeadTile> query_rows(near, lane / 16), key_rows(far, lane / 8 % 2);
  float4* const weights = reinterpret_cast<float4*>(shared + kWeightsAt) + lane;
  uint4* const packed = reinterpret_cast<uint4*>(shared + kPackedAt) + lane;
  float* const maxima = reinterpret_cast<float*>(shared + kMaximaAt) + lane / 4;
  float* const factors = reinterpret_cast<float*>(shared + kFactorsAt) + lane / 4;
  const Weights of_leaf{weights, packed, factors};
  float2* const states = reinterpret_cast<float2*>(shared + kStatesAt);
  float* const left = reinterpret_cast<float*>(shared + kLeftAt);
  // Rows beyond the last are computed as this, and not read.
  const auto index_of = [&](u32 r) { return smaller(p.index_begin + lane / 4 + 8 * r, last); };
  u64 mask[2] = {0, 0};
  for (u32 r = 0; kMaskType != 0 && r < 2; ++r)
    mask[r] = mask_address(p, batch, group, index_of(r));
  const float unit = kFinished ? 1.0f : p.scale;

#pragma unroll 1
  for (u32 i = 0; i < leaves; ++i) {
    const Leaf leaf = leaf_of(first_leaf + i, seen);
    const bool empty = leaf.begin >= leaf.end;
    const bool mine = i32(step) >= leaf.begin && i32(step) < leaf.end;
    if (i == 0) {
      copies_wait<kSlots - 1>();
      __syncthreads();  // q is there
    } else {
      copies_wait<kSlots - 2>();
      __syncwarp();
    }
    // Scores.
    float s[kStep / 2], most[2] = {hidden(), hidden()};
    if (mine) {
      const u32 keys = slot_of(2 * i) + step * kSlotBytes;
      multiply_keys(
          s, [&](i32 j, u32(&a)[4]) { load_matrices(a, query_rows.at(base + kQueryAt, j, 0)); },
          [&](i32 j, i32 n, u32(&x)[4]) { load_matrices(x, key_rows.at(keys, j, n)); });
      const i32 key = leaf.key + i32(step) * kStreams * kStep;
      const bool edge = key < full.begin || key + kStep > full.end;
      if (kFinished || edge) {
        finish_scores(s, p, mask, key + 2 * i32(lane % 4), edge, p.softcap,
                      [&](u32 r) { return visible(batch_seen, row_of(p, index_of(r))); });
      }
#pragma unroll
      for (u32 r = 0; r < 2; ++r) most[r] = row_maximum(s, r) * unit;
    }
    if (lane % 4 == 0) {
      for (u32 r = 0; r < 2; ++r) maxima[step * kRows + 8 * r] = most[r];
    }
    __syncthreads();  // and all have done with the leaf before
#pragma unroll 1
    for (u32 part = i == 0 ? 2 * i : 2 * i - 1; part <= 2 * i; ++part) fetch(part + kSlots);
    // Weights, against the maxima up to this step.
    Sums c{{hidden(), hidden()}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    float all[2] = {hidden(), hidden()};  // of all steps
#pragma unroll
    for (u32 j = 0; j < kLeafSteps; ++j) {
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const float top = maxima[j * kRows + 8 * r];
        if (j < step) c.m[r] = fmaxf(c.m[r], top);
        all[r] = fmaxf(all[r], top);
      }
    }
    {
      float alpha[2] = {1.0f, 1.0f};
      if (mine) {
        const float tops[2] = {fmaxf(c.m[0], most[0]), fmaxf(c.m[1], most[1])};
        if (__any_sync(~0u, is_far(tops[0]) || is_far(tops[1]))) {
          weigh<true>(s, c, tops, unit, alpha);
        } else {
          weigh<false>(s, c, tops, unit, alpha);
        }
      } else {
        for (i32 j = 0; j < kStep / 2; ++j) s[j] = 0.0f;
      }
#pragma unroll
      for (u32 n = 0; n < kStep / 16; ++n) {
        const float* const of = s + 8 * n;
        packed[(step * (kStep / 16) + n) * 32] = {pack(of[0], of[1]), pack(of[2], of[3]),
                                                  pack(of[4], of[5]), pack(of[6], of[7])};
        for (u32 j = 0; j < 2; ++j) {
          weights[(step * (kStep / 8) + 2 * n + j) * 32] = {of[4 * j], of[4 * j + 1], of[4 * j + 2],
                                                            of[4 * j + 3]};
        }
      }
      if (lane % 4 == 0) {
        for (u32 r = 0; r < 2; ++r) factors[step * kRows + 8 * r] = alpha[r];
      }
    }
    copies_wait<kSlots - 1>();
    __syncthreads();
    if (warp < kTileRows / 8) {
      // The sums of weights of half of the rows, as weigh() adds them up.
      const u32 r = warp;
      float t = 0.0f;
#pragma unroll
      for (u32 j = 0; j < kLeafSteps; ++j) {
        float sum[2] = {t * factors[j * kRows + 8 * r], 0.0f};
#pragma unroll
        for (u32 n = 0; n < kStep / 8; ++n) {
          const float2 w = reinterpret_cast<const float2*>(weights + (j * (kStep / 8) + n) * 32)[r];
          sum[0] += w.x;
          sum[1] += w.y;
        }
        t = sum[0] + sum[1];
      }
      const float l = quad_sum(t);
      // A NaN: the row stays NaN whatever it meets.
      const float2 ml{is_nan(l) ? nan() : r == 0 ? all[0] : all[1], l * kWeightUnit};
      if (lane % 4 == 0) {
        states[i * kTileRows + lane / 4 + 8 * r] =
            empty || l == 0.0f ? float2{hidden(), -1.0f} : ml;
      }
    }
    if (empty) continue;
#pragma unroll 1
    for (u32 slice = warp; slice < kWidth / 16; slice += kLeafSteps) {  // 16 columns
      const u32 values = slot_of(2 * i + 1) + ValueTile::at(near, lane / 16 + 2 * slice);
      float o[8];
      multiply_values<kFast>(o, of_leaf, values);
      float zero = 0.0f;  // or NaN
      for (u32 e = 0; e < 8; ++e) zero = fmaf(o[e], 0.0f, zero);
      if (__any_sync(~0u, is_nan(zero))) {
        multiply_values<kMarks>(o, of_leaf, values);
        u32 codes = 0;
        for (u32 e = 0; e < 8; ++e) codes |= odd_code(o[e]) << (2 * e);
        multiply_values<kFinite>(o, of_leaf, values);
        for (u32 e = 0; e < 8; ++e) {
          if (const u32 code = codes >> (2 * e) & 3) o[e] = odd_value(code);
        }
      }
      float* const to = left + (i * kTileRows + lane / 4) * kLeftPitch + 16 * slice + lane % 4 * 2;
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        if (8 * r >= kTileRows) break;
        for (u32 j = 0; j < 2; ++j) {
          *reinterpret_cast<float2*>(to + 8 * r * kLeftPitch + 8 * j) = {
              o[4 * j + 2 * r] * kWeightUnit, o[4 * j + 2 * r + 1] * kWeightUnit};
        }
      }
    }
  }
  cluster_sync();

  // Results, four columns of a row at a time, by as many lanes as there are blocks.
  const u32 items = (last + 1 - p.index_begin) * kQuads, each = (items + peers - 1) / peers;
  const u32 peer = lane % peers, at_once = 32 / peers;
#pragma unroll 1
  for (u32 begin = warp * at_once; begin < each; begin += kThreads / 32 * at_once) {
    const u32 within = begin + lane / peers, item = blockIdx.x * each + within;
    const bool valid = within < each && item < items;
    const u32 row = valid ? item / kQuads : 0, column = valid ? 4 * (item % kQuads) : 0;
    Sum of[kMostLeaves];
#pragma unroll
    for (u32 i = 0; i < kMostLeaves; ++i) {
      of[i] = {{hidden(), -1.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
      if (i >= leaves) continue;
      const u32 at = i * kTileRows + row;
      of[i].ml = read_peer_float2(address_in(peer, base + kStatesAt + 8 * at));
      of[i].o = read_peer_float4(address_in(peer, base + kLeftAt + 4 * (at * kLeftPitch + column)));
    }
#pragma unroll
    for (u32 span = 1; span < kMostLeaves; span *= 2) {
#pragma unroll
      for (u32 i = 0; i < kMostLeaves; i += 2 * span) {
        if (i + span < leaves) join(of[i], of[i + span]);
      }
    }
    const u32 blocks = smaller(peers, kLeavesOfSplit / leaves);  // of a split
#pragma unroll 1
    for (u32 span = 1; span < blocks; span *= 2) join(of[0], shuffled_down(of[0], span));
    const float sum[4] = {of[0].o.x, of[0].o.y, of[0].o.z, of[0].o.w};
    of[0].o = positive_zeros(sum);
    float2 ml{hidden(), 0.0f};
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (u32 i = 0; i < peers; i += blocks) {
      const Sum later = shuffled_down(of[0], i);
      if (later.ml.y < 0.0f) continue;
      const Factors f = merge_states(ml, later.ml);
      o = merge_values(o, later.o, f);
    }
    if (valid && peer == 0) {
      write_result(p, ends, group, p.index_begin + row, column, ml, o, column + 4 == kValueDim);
    }
  }
  cluster_sync();  // no block ends before all have read what it has
}

// Prefill on CUDA cores: a tile of rows of one group against splits of keys. A split is reduced
// from the empty state, tile of keys after tile of keys, counted from the split's begin; so a row's
// bits depend on neither its place in the tile nor the rows beside it.
#include "common.cuh"

// A block is kTy x kTx threads, x innermost. A thread holds the scores of kTr rows x kTc keys and
// the outputs of the same rows x kGroups groups of four columns. All are powers of two except
// kGroups; kTx is at most 32, so that a row stays in one warp.
constexpr u32 kTy = KEYFOLD_TY;
constexpr u32 kTx = KEYFOLD_TX;
constexpr u32 kTr = KEYFOLD_TR;
constexpr u32 kTc = KEYFOLD_TC;
constexpr u32 kGroups = KEYFOLD_GROUPS;
constexpr u32 kSliceWords = KEYFOLD_SLICE_WORDS;  // 16-byte words of a row in shared memory
constexpr u32 kSliceKeys = KEYFOLD_SLICE_KEYS;    // keys of V in shared memory
constexpr bool kPartial = KEYFOLD_PARTIAL;

static_assert(kThreads == kTy * kTx, "");
constexpr u32 kRows = kTy * kTr;
constexpr u32 kKeys = kTx * kTc;
constexpr u32 kRowVecs = kRows / 4;
constexpr u32 kKeyVecs = kKeys / 4;
constexpr u32 kTrVecs = kTr / 4;
constexpr u32 kTcVecs = kTc / 4;
constexpr u32 kColumns = kGroups * kTx;  // groups of four columns, those past kValueVecs unused

// Slices of q and k, transposed: [element][row or key]; later the weights: [key][row]. Slices are
// twofold, and loaded one ahead: one is written while another is read.
constexpr u32 kSliceElements = kSliceWords * kElements;
constexpr u32 kSliceVecs = kSliceElements * (kRowVecs + kKeyVecs);
constexpr u32 kWeightVecs = kKeys * kRowVecs;
constexpr u32 kValueSliceVecs = kSliceKeys * kColumns;

// Shared memory, which is KEYFOLD_SHARED bytes.
constexpr u32 kStageVecs = larger(2 * kSliceVecs, kWeightVecs);
constexpr u32 kValuesAt = kStageVecs * 16;
constexpr u32 kStatesAt = kValuesAt + 2 * kValueSliceVecs * 16;
constexpr u32 kRangesAt = kStatesAt + kRows * 8;
constexpr u32 kRedoAt = kRangesAt + kRows * 8;
static_assert(kRedoAt + 4 == KEYFOLD_SHARED, "as in kernel_shape.cpp");

// A thread loads blocks of one 16-byte word of four rows or keys, and single words of v.
constexpr u32 kBlocks = kSliceWords * (kRowVecs + kKeyVecs);
constexpr u32 kRounds = (kBlocks + kThreads - 1) / kThreads;
constexpr u32 kValueRounds = (kSliceKeys * kValueWords + kThreads - 1) / kThreads;

// The column of a float4 in its line of the stage; spreads what a warp writes over the banks.
KEYFOLD_INLINE u32 swizzle(u32 w, u32 vecs) { return w * (8 / kSliceWords) & 7 & (vecs - 1); }
KEYFOLD_INLINE u32 weight_swizzle(u32 key) { return (key >> 2) & 7 & (kRowVecs - 1); }

KEYFOLD_INLINE void unpack(float* to, float4 x) {
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
}

// A thread: its place, and the state that lasts for a split.
struct Thread {
  const Params& params;
  float4* s_stage;
  float4* s_v;
  float2* s_ml;
  Range* s_ranges;  // keys that each row sees
  u32* s_redo;      // 1 + the last split whose output has to be weighed again
  u32 id, x, y;
  u32 group, first;  // absolute group; index of the tile's first row
  float o[kTr][4 * kGroups];
  float s[kTr][kTc];
  uint4 slice[kRounds][4], values[kValueRounds];  // loaded ahead

  // Loads words `word`.. of the tile's rows and of the keys from `key` on.
  KEYFOLD_INLINE void load_slice(u64 k, i32 key, i32 limit, u32 word) {
#pragma unroll
    for (u32 round = 0; round < kRounds; ++round) {
      const u32 b = round * kThreads + opaque(id);
      const u32 w = word + b % kSliceWords, column = b / kSliceWords;
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        slice[round][i] = {0, 0, 0, 0};
        if (b >= kBlocks || w >= kHeadWords) continue;
        if (column < kRowVecs) {
          const u32 index = first + 4 * column + i;
          if (index >= params.index_end) continue;
          slice[round][i] =
              load_words(params.q + (state_index(params, group, index) * kHeadWords + w) * 16);
        } else {
          const i32 at = i32(opaque(u32(key))) + i32(4 * (column - kRowVecs) + i);
          if (at >= limit) continue;
          slice[round][i] = load_words(k + i64(at) * params.k_key + 16 * w);
        }
      }
    }
  }

  // Transposes the blocks into one of the two slices.
  KEYFOLD_INLINE void store_slice(u32 which) {
#pragma unroll
    for (u32 round = 0; round < kRounds; ++round) {
      const u32 b = round * kThreads + opaque(id);
      if (b >= kBlocks) continue;
      const u32 w = b % kSliceWords, column = b / kSliceWords;
      const bool row = column < kRowVecs;
      const u32 vecs = row ? kRowVecs : kKeyVecs;
      const u32 place = row ? column : column - kRowVecs;
      const u32 at = which * kSliceVecs + (row ? 0 : kSliceElements * kRowVecs) +
                     w * kElements * vecs + (place ^ swizzle(w, vecs));
#pragma unroll
      for (u32 part = 0; part < kVecs; ++part) {
        const float4 r0 = elements(slice[round][0], part), r1 = elements(slice[round][1], part);
        const float4 r2 = elements(slice[round][2], part), r3 = elements(slice[round][3], part);
        s_stage[at + (4 * part + 0) * vecs] = {r0.x, r1.x, r2.x, r3.x};
        s_stage[at + (4 * part + 1) * vecs] = {r0.y, r1.y, r2.y, r3.y};
        s_stage[at + (4 * part + 2) * vecs] = {r0.z, r1.z, r2.z, r3.z};
        s_stage[at + (4 * part + 3) * vecs] = {r0.w, r1.w, r2.w, r3.w};
      }
    }
  }

  KEYFOLD_INLINE void load_values(u64 v, i32 key, i32 limit) {
#pragma unroll
    for (u32 round = 0; round < kValueRounds; ++round) {
      const u32 b = round * kThreads + opaque(id);
      const i32 at = key + i32(b / kValueWords);
      values[round] = {0, 0, 0, 0};
      if (b >= kSliceKeys * kValueWords || at >= limit) continue;
      values[round] = load_words(v + i64(at) * params.v_key + 16 * (b % kValueWords));
    }
  }

  KEYFOLD_INLINE void store_values(u32 which) {
#pragma unroll
    for (u32 round = 0; round < kValueRounds; ++round) {
      const u32 b = round * kThreads + opaque(id);
      if (b >= kSliceKeys * kValueWords) continue;
#pragma unroll
      for (u32 part = 0; part < kVecs; ++part) {
        s_v[which * kValueSliceVecs + b / kValueWords * kColumns + b % kValueWords * kVecs + part] =
            elements(values[round], part);
      }
    }
  }

  // q.k of a tile: chains of fma over ascending elements. The first slice is loaded already.
  KEYFOLD_INLINE void multiply(u64 k, i32 key, i32 limit) {
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
#pragma unroll
      for (u32 c = 0; c < kTc; ++c) s[r][c] = 0.0f;
    }
    store_slice(0);
    __syncthreads();
    u32 which = 0;
#pragma unroll 1
    for (u32 word = 0; word < kHeadWords; word += kSliceWords) {
      const bool more = word + kSliceWords < kHeadWords;
      if (more) load_slice(k, key, limit, word + kSliceWords);
      const u32 words = smaller(kSliceWords, kHeadWords - word);
#pragma unroll 1
      for (u32 w = 0; w < words; ++w) {
        const u32 row_at = which * kSliceVecs + w * kElements * kRowVecs;
        const u32 key_at =
            which * kSliceVecs + kSliceElements * kRowVecs + w * kElements * kKeyVecs;
        u32 row_column[kTrVecs], key_column[kTcVecs];
#pragma unroll
        for (u32 j = 0; j < kTrVecs; ++j) {
          row_column[j] = row_at + ((y * kTrVecs + j) ^ swizzle(w, kRowVecs));
        }
#pragma unroll
        for (u32 j = 0; j < kTcVecs; ++j) {
          key_column[j] = key_at + ((j * kTx + x) ^ swizzle(w, kKeyVecs));
        }
#pragma unroll
        for (u32 e = 0; e < kElements; ++e) {
          float a[kTr], b[kTc];
#pragma unroll
          for (u32 j = 0; j < kTrVecs; ++j)
            unpack(a + 4 * j, s_stage[row_column[j] + e * kRowVecs]);
#pragma unroll
          for (u32 j = 0; j < kTcVecs; ++j)
            unpack(b + 4 * j, s_stage[key_column[j] + e * kKeyVecs]);
#pragma unroll
          for (u32 r = 0; r < kTr; ++r) {
#pragma unroll
            for (u32 c = 0; c < kTc; ++c) s[r][c] = fmaf(a[r], b[c], s[r][c]);
          }
        }
      }
      which = 1 - which;
      if (more) store_slice(which);
      __syncthreads();
    }
  }

  KEYFOLD_INLINE u32 key_of(u32 c) const { return c / 4 * 4 * kTx + 4 * x + c % 4; }

  // Products to weights in shared memory; m, l and o follow.
  KEYFOLD_INLINE void soften(u32 batch_index, i32 key, i32 split_end, bool whole) {
    float most[kTr];
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
      Range range{0, 0x7fffffff};
      if (!whole) {
        range = s_ranges[y * kTr + r];
        range.end = smaller(range.end, split_end);
      }
      most[r] = hidden();
      u64 mask = 0;
      if constexpr (kMaskType != 0) {
        mask = mask_address(params, batch_index, group, opaque(first) + y * kTr + r);
      }
#pragma unroll
      for (u32 c = 0; c < kTc; ++c) {
        const i32 at = key + i32(key_of(c));
        float p = hidden();
        if constexpr (kMaskType == 0) {
          p = score(params, s[r][c], 0);
          p = whole || (at >= range.begin && at < range.end) ? p : hidden();
        } else if (at >= range.begin && at < range.end) {
          p = score(params, s[r][c], mask + i64(at) * params.mask_key);
        }
        s[r][c] = p;
        most[r] = p > most[r] ? p : most[r];
      }
    }
#pragma unroll
    for (u32 lanes = 1; lanes < kTx; lanes *= 2) {
#pragma unroll
      for (u32 r = 0; r < kTr; ++r) {
        const float other = __shfl_xor_sync(~0u, most[r], lanes);
        most[r] = other > most[r] ? other : most[r];
      }
    }
    float sum[kTr], factor[kTr];
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
      const float before = s_ml[y * kTr + r].x;
      most[r] = most[r] > before && !is_nan(before) ? most[r] : before;
      const float base = base_of(most[r]);
      factor[r] = exp_nonpositive(before - base);
      sum[r] = 0.0f;
#pragma unroll
      for (u32 c = 0; c < kTc; ++c) {
        s[r][c] = exp_nonpositive(s[r][c] - base);
        sum[r] = sum[r] + s[r][c];
      }
    }
#pragma unroll
    for (u32 lanes = 1; lanes < kTx; lanes *= 2) {
#pragma unroll
      for (u32 r = 0; r < kTr; ++r) sum[r] = sum[r] + __shfl_xor_sync(~0u, sum[r], lanes);
    }
    __syncwarp();  // all lanes of a row have read its m
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
#pragma unroll
      for (u32 g = 0; g < 4 * kGroups; ++g) {
        o[r][g] = factor[r] == 0.0f ? 0.0f : o[r][g] * factor[r];
      }
      if (x == 0) {
        const float before = s_ml[y * kTr + r].y;
        const float l = factor[r] == 0.0f ? sum[r] : before * factor[r] + sum[r];
        // A NaN score, or one of +Inf: the row stays NaN whatever follows.
        s_ml[y * kTr + r] = {is_nan(l) ? nan() : most[r], l};
      }
    }
#pragma unroll
    for (u32 c = 0; c < kTc; ++c) {
      const u32 at = key_of(c);
#pragma unroll
      for (u32 j = 0; j < kTrVecs; ++j) {
        s_stage[at * kRowVecs + ((y * kTrVecs + j) ^ weight_swizzle(at))] = {
            s[4 * j][c], s[4 * j + 1][c], s[4 * j + 2][c], s[4 * j + 3][c]};
      }
    }
  }

  // o += the weights of one key times its values; `exact` passes over weights of 0.
  KEYFOLD_INLINE void weigh_key(const u32* columns, u32 line, const float4* line_of_v, bool exact) {
    float p[kTr];
#pragma unroll
    for (u32 j = 0; j < kTrVecs; ++j) unpack(p + 4 * j, s_stage[columns[j] + line * kRowVecs]);
#pragma unroll
    for (u32 g = 0; g < kGroups; ++g) {
      float v[4];
      unpack(v, line_of_v[g * kTx]);
#pragma unroll
      for (u32 r = 0; r < kTr; ++r) {
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          const float sum = fmaf(p[r], v[e], o[r][4 * g + e]);
          o[r][4 * g + e] = exact && p[r] == 0.0f ? o[r][4 * g + e] : sum;
        }
      }
    }
  }

  // o += weights times values of keys [begin, end) of the tile that begins at `key`, in whole
  // slices: chains of fma over ascending keys. The first slice is loaded already.
  KEYFOLD_INLINE void weigh(u64 v, i32 key, u32 begin, u32 end, i32 limit, bool exact) {
    store_values(0);
    __syncthreads();
    u32 which = 0;
#pragma unroll 1
    for (; begin < end; begin += kSliceKeys) {
      const bool more = begin + kSliceKeys < end;
      if (more) load_values(v, key + i32(begin + kSliceKeys), limit);
      const float4* const values_at = s_v + which * kValueSliceVecs + x;
#pragma unroll 1
      for (u32 four = 0; four < kSliceKeys; four += 4) {
        u32 columns[kTrVecs];
#pragma unroll
        for (u32 j = 0; j < kTrVecs; ++j) {
          columns[j] =
              (begin + four) * kRowVecs + ((y * kTrVecs + j) ^ weight_swizzle(begin + four));
        }
        if (!exact) {
#pragma unroll
          for (u32 i = 0; i < 4; ++i)
            weigh_key(columns, i, values_at + (four + i) * kColumns, false);
        } else {
#pragma unroll 1
          for (u32 i = 0; i < 4; ++i)
            weigh_key(columns, i, values_at + (four + i) * kColumns, true);
        }
      }
      which = 1 - which;
      if (more) store_values(which);
      __syncthreads();
    }
  }

  // Whether a column of a row that is not all NaN holds a NaN or Inf: from a value of a key that it
  // sees, or from a weight of 0.
  KEYFOLD_INLINE bool suspicious() const {
    bool found = false;
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
      const bool numbers = !is_nan(s_ml[y * kTr + r].y);
#pragma unroll
      for (u32 g = 0; g < 4 * kGroups; ++g) {
        const bool inside = g / 4 * kTx + x < kValueVecs;
        if (numbers && inside) found = found || !is_finite(o[r][g]);
      }
    }
    return found;
  }

  // The rows' partial states of a split: into the wave's, or merged into the running states.
  KEYFOLD_INLINE void finish(u32 split) {
#pragma unroll
    for (u32 r = 0; r < kTr; ++r) {
      const u32 row = opaque(y) * kTr + r, index = first + row;
      const float2 part = s_ml[row];
      const bool seen = part.y != 0.0f;
      const bool inside = index < params.index_end;
      if constexpr (kPartial) {
        if (!inside) continue;
        const u64 at = partial_index(params, blockIdx.z, split - params.split, index);
        if (x == 0) write(params.partial_ml + 8 * at, seen ? part : float2{hidden(), -1.0f});
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
          const u32 column = g * kTx + opaque(x);
          if (column >= kValueVecs) continue;
          write(params.partial_o + (at * kValueVecs + column) * 16,
                seen ? positive_zeros(o[r] + 4 * g) : float4{0.0f, 0.0f, 0.0f, 0.0f});
        }
      } else {
        const u64 at = state_index(params, group, index);
        // One lane keeps m and l in memory, as only it may read what it wrote without a barrier.
        float2 state{0.0f, 0.0f};
        if (x == 0 && inside) state = read_float2(params.ml + 8 * at);
        state = {__shfl_sync(~0u, state.x, 0, kTx), __shfl_sync(~0u, state.y, 0, kTx)};
        if (!inside || !seen) continue;
        const Factors factors = merge_states(state, part);
        if (x == 0) write(params.ml + 8 * at, state);
#pragma unroll
        for (u32 g = 0; g < kGroups; ++g) {
          const u32 column = g * kTx + x;
          if (column >= kValueVecs) continue;
          const u64 place = params.o + (at * kValueVecs + column) * 16;
          const float4 before = read_float4(place), later = positive_zeros(o[r] + 4 * g);
          write(place, float4{merge_values(before.x, later.x, factors),
                              merge_values(before.y, later.y, factors),
                              merge_values(before.z, later.z, factors),
                              merge_values(before.w, later.w, factors)});
        }
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ Params params) {
  extern __shared__ float4 s_memory[];
  auto* const bytes = reinterpret_cast<unsigned char*>(s_memory);
  Thread t{params,
           s_memory,
           reinterpret_cast<float4*>(bytes + kValuesAt),
           reinterpret_cast<float2*>(bytes + kStatesAt),
           reinterpret_cast<Range*>(bytes + kRangesAt),
           reinterpret_cast<u32*>(bytes + kRedoAt),
           threadIdx.x,
           threadIdx.x % kTx,
           threadIdx.x / kTx};
  t.group = params.group + blockIdx.z;
  // The last rows see the most keys when a call is causal: they begin first.
  t.first = params.index_begin + (gridDim.x - 1 - blockIdx.x) * kRows;
  const u32 batch_index = t.group / params.kv_heads, kv_head = t.group % params.kv_heads;
  const Batch batch = load_batch(params, batch_index);
  const u64 k = params.k + i64(batch_index) * params.k_batch + i64(kv_head) * params.k_head;
  const u64 v = params.v + i64(batch_index) * params.v_batch + i64(kv_head) * params.v_head;

  // Ranges never step back from row to row: the tile sees [early.begin, late.end), each row at
  // least [late.begin, early.end).
  const u32 index_last = smaller(t.first + kRows, params.index_end) - 1;
  const Range early = visible(batch, t.first / params.heads);
  const Range late = visible(batch, index_last / params.heads);

  for (u32 r = t.id; r < kRows; r += kThreads) {
    const bool inside = t.first + r < params.index_end;
    t.s_ranges[r] = inside ? visible(batch, (t.first + r) / params.heads) : Range{0, 0};
  }
  if (t.id == 0) *t.s_redo = 0;
  const u32 split_first = params.split + (kPartial ? blockIdx.y : 0);
  const u32 split_last = kPartial ? split_first + 1 : params.split + params.num_splits;
#pragma unroll 1
  for (u32 split = split_first; split < split_last; ++split) {
    const i32 split_begin = i32(split * kSplitLen);
    const i32 split_end = split_begin + i32(kSplitLen);
    const i32 begin = larger(early.begin, split_begin), end = smaller(late.end, split_end);
    if (!kPartial && begin >= end) continue;
    bool exact = false;
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (u32 r = 0; r < kTr; ++r) {
#pragma unroll
        for (u32 g = 0; g < 4 * kGroups; ++g) t.o[r][g] = 0.0f;
      }
      __syncthreads();
      for (u32 r = t.id; r < kRows; r += kThreads) t.s_ml[r] = {hidden(), 0.0f};
      __syncthreads();
      const i32 tile = begin < end ? begin - (begin - split_begin) % i32(kKeys) : end;
      if (begin < end) t.load_slice(k, tile, batch.limit, 0);
#pragma unroll 1
      for (i32 key = tile; key < end; key += i32(kKeys)) {
        // Slices of v that no row of the tile sees are passed over.
        const u32 first_key = u32(larger(begin - key, 0)) / kSliceKeys * kSliceKeys;
        const u32 last_key = smaller(u32(end - key), kKeys);
        t.multiply(k, key, batch.limit);
        const bool whole = key >= late.begin && key + i32(kKeys) <= smaller(early.end, split_end) &&
                           t.first + kRows <= params.index_end;
        // On their way during the softmax, which needs the registers itself where there is a mask.
        if (kMaskType == 0) t.load_values(v, key + i32(first_key), batch.limit);
        t.soften(batch_index, key, split_end, whole);
        if (kMaskType != 0) t.load_values(v, key + i32(first_key), batch.limit);
        if (key + i32(kKeys) < end) t.load_slice(k, key + i32(kKeys), batch.limit, 0);
        t.weigh(v, key, first_key, last_key, batch.limit, exact);
      }
      if (exact) break;
      if (t.suspicious()) *t.s_redo = split + 1;
      __syncthreads();
      if (*t.s_redo != split + 1) break;
      exact = true;
    }
    t.finish(split);
  }
}

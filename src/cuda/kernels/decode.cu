// Decode: few rows of one group against one split of keys; gives partial states for merge.cu.
// K and V go straight from memory to registers, 16 bytes a lane; lanes side by side share a key.
// The order of every sum is fixed by the split and the constants, and is the same for each kRows.
#include "common.cuh"

constexpr u32 kWarps = KEYFOLD_WARPS;
constexpr u32 kRows = KEYFOLD_ROWS;               // 1, 2, 4 or 8
constexpr u32 kHeadLanes = KEYFOLD_HEAD_LANES;    // that share a key; powers of two, at most 32
constexpr u32 kValueLanes = KEYFOLD_VALUE_LANES;  //

static_assert(kThreads == kWarps * 32, "");
constexpr u32 kHeadPer = (kHeadWords + kHeadLanes - 1) / kHeadLanes;  // words of a key in a lane
constexpr u32 kValuePer = (kValueWords + kValueLanes - 1) / kValueLanes;
constexpr u32 kBatch = kHeadPer == 1 ? 4 : kHeadPer == 2 ? 2 : 1;  // keys a lane loads at a time
constexpr u32 kValueBatch = kValuePer == 1 ? 4 : kValuePer == 2 ? 2 : 1;
constexpr u32 kItems = kBatch * kRows;  // scores that kHeadLanes lanes work on together
constexpr u32 kHeadStep = kThreads / kHeadLanes * kBatch;  // keys that the block takes at a time
constexpr u32 kValueStep = kThreads / kValueLanes * kValueBatch;
constexpr u32 kValueParts = kValuePer * kVecs;          // groups of four columns in a lane
constexpr u32 kLeft = larger(kItems / kHeadLanes, 1u);  // items in a lane when they are summed up

struct Shared {
  float scores[kRows][kSplitLen];  // then the weights
  float4 o[kWarps][kValueParts][kValueLanes];
  float2 ml[kRows];
  Range range[kRows];  // keys of the split that each row sees
  u32 redo;
};

struct Thread {
  const Params& params;
  Shared& shared;
  u32 id, warp, lane, first;
  Range range;  // keys of the split that any row sees
  float q[kRows][4 * kVecs * kHeadPer];
  float items[kItems];
  float o[kRows][4 * kValueParts];
  uint4 k_words[kBatch][kHeadPer], v_words[kValueBatch][kValuePer];  // loaded ahead

  // The nearest key that a row sees: what is loaded in the place of others gets no weight.
  KEYFOLD_INLINE i64 nearest(i32 key) const { return clamped(key, range.begin, range.end - 1); }

  KEYFOLD_INLINE void load_q(u32 group) {
    const u32 head_lane = id % kHeadLanes;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
#pragma unroll
      for (u32 j = 0; j < kHeadPer; ++j) {
        const u32 w = j * kHeadLanes + head_lane;
        uint4 word{0, 0, 0, 0};
        if (w < kHeadWords && first + r < params.index_end) {
          word =
              load_words(params.q + (state_index(params, group, first + r) * kHeadWords + w) * 16);
        }
#pragma unroll
        for (u32 part = 0; part < kVecs; ++part) {
          const float4 x = elements(word, part);
          float* const to = q[r] + 4 * (j * kVecs + part);
          to[0] = x.x;
          to[1] = x.y;
          to[2] = x.z;
          to[3] = x.w;
        }
      }
    }
  }

  // Adds items over the lanes that share a key. Where a lane holds several items, it gives half of
  // them away and keeps the other half; the tree of an item's sum is the same either way. Returns
  // the first item that is left in this lane.
  KEYFOLD_INLINE u32 reduce_items() {
    u32 first_item = 0;
#pragma unroll
    for (u32 step = 0; step < 7; ++step) {
      const u32 mask = kHeadLanes >> (step + 1), kept = kItems >> (step + 1);
      if (mask == 0) continue;
      const bool upper = (lane & mask) != 0;
      if (kept == 0) {
        items[0] = items[0] + __shfl_xor_sync(~0u, items[0], mask);
      } else {
#pragma unroll
        for (u32 j = 0; j < kItems / 2; ++j) {
          if (j >= kept) continue;
          const float mine = upper ? items[j + kept] : items[j];
          const float other = upper ? items[j] : items[j + kept];
          items[j] = mine + __shfl_xor_sync(~0u, other, mask);
        }
        first_item += upper ? kept : 0;
      }
    }
    return first_item;
  }

  // The words of this lane of the keys that begin at `step`.
  KEYFOLD_INLINE void load_keys(u64 k, i32 step) {
    const u32 head_lane = id % kHeadLanes;
#pragma unroll
    for (u32 i = 0; i < kBatch; ++i) {
      const i32 key = step + i32(id / kHeadLanes * kBatch + i);
      const u64 from = k + nearest(key) * params.k_key + 16 * head_lane;
#pragma unroll
      for (u32 j = 0; j < kHeadPer; ++j) {
        k_words[i][j] = {0, 0, 0, 0};
        if (kHeadPer * kHeadLanes > kHeadWords && j * kHeadLanes + head_lane >= kHeadWords)
          continue;
        k_words[i][j] = load_words(from + 16 * kHeadLanes * j);
      }
    }
  }

  // Scores of the keys of the split that begin at `from`, in steps of kHeadStep. k points at the
  // split's first key.
  KEYFOLD_INLINE void score_keys(u64 k, u32 batch_index, u32 group, i32 split_begin, i32 from) {
    const i32 stream = i32(id / kHeadLanes * kBatch);
    uint4 words[kBatch][kHeadPer];
    load_keys(k, from);
#pragma unroll 1
    for (i32 step = from; step < range.end; step += i32(kHeadStep)) {
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) {
#pragma unroll
        for (u32 j = 0; j < kHeadPer; ++j) words[i][j] = k_words[i][j];
      }
      load_keys(k, step + i32(kHeadStep));  // on their way while these are multiplied
#pragma unroll
      for (u32 i = 0; i < kItems; ++i) items[i] = 0.0f;
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i) {
#pragma unroll
        for (u32 j = 0; j < kHeadPer; ++j) {
#pragma unroll
          for (u32 part = 0; part < kVecs; ++part) {
            const float4 vec = elements(words[i][j], part);
            const float x[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
#pragma unroll
              for (u32 r = 0; r < kRows; ++r) {
                items[i * kRows + r] =
                    fmaf(q[r][4 * (j * kVecs + part) + e], x[e], items[i * kRows + r]);
              }
            }
          }
        }
      }
      const u32 first_item = reduce_items();
#pragma unroll
      for (u32 i = 0; i < kLeft; ++i) {
        const u32 r = (first_item + i) % kRows;
        const i32 key = step + stream + i32((first_item + i) / kRows);
        if (key >= i32(kSplitLen)) continue;
        const Range seen = shared.range[r];
        float s = hidden();
        if (key >= seen.begin && key < seen.end) {
          u64 mask = 0;
          if constexpr (kMaskType != 0) {
            mask = mask_address(params, batch_index, group, first + r) +
                   i64(split_begin + key) * params.mask_key;
          }
          s = score(params, items[i], mask);
        }
        shared.scores[r][key] = s;
      }
    }
  }

  // Scores to weights; a warp takes a row. Keys before `from` have no score. Those of the steps of
  // weigh(), which begin at `value_from`, that no row sees get a weight of 0.
  KEYFOLD_INLINE void soften(i32 from, i32 value_from) {
    const i32 begin = from / 32 * 32;
    const i32 value_begin = smaller(begin, value_from / 32 * 32);
    const i32 value_end = (range.end + i32(kValueStep) - 1) / i32(kValueStep) * i32(kValueStep);
#pragma unroll 1
    for (u32 r = warp; r < kRows; r += kWarps) {
      float most = hidden();
      for (i32 key = begin + i32(lane); key < range.end; key += 32) {
        const float s = key >= from ? shared.scores[r][key] : hidden();
        most = s > most ? s : most;
      }
#pragma unroll
      for (u32 lanes = 1; lanes < 32; lanes *= 2) {
        const float other = __shfl_xor_sync(~0u, most, lanes);
        most = other > most ? other : most;
      }
      const float base = base_of(most);
      float l = 0.0f;
      for (i32 key = value_begin + i32(lane); key < value_end; key += 32) {
        float p = 0.0f;
        if (key >= from && key < range.end) p = exp_nonpositive(shared.scores[r][key] - base);
        shared.scores[r][key] = p;
        l = l + p;
      }
#pragma unroll
      for (u32 lanes = 1; lanes < 32; lanes *= 2) l = l + __shfl_xor_sync(~0u, l, lanes);
      // A NaN score, or one of +Inf: the row stays NaN whatever it is merged with.
      if (lane == 0) shared.ml[r] = {is_nan(l) ? nan() : most, l};
    }
  }

  KEYFOLD_INLINE void load_values(u64 v, i32 step) {
    const u32 value_lane = id % kValueLanes;
#pragma unroll
    for (u32 i = 0; i < kValueBatch; ++i) {
      const i32 key = step + i32(id / kValueLanes * kValueBatch + i);
      const u64 from = v + nearest(key) * params.v_key + 16 * value_lane;
#pragma unroll
      for (u32 j = 0; j < kValuePer; ++j) {
        v_words[i][j] = {0, 0, 0, 0};
        if (kValuePer * kValueLanes > kValueWords && j * kValueLanes + value_lane >= kValueWords) {
          continue;
        }
        v_words[i][j] = load_words(from + 16 * kValueLanes * j);
      }
    }
  }

  // o = weights times values; `exact` passes over weights of 0. v_words holds the first values.
  template <bool exact>
  KEYFOLD_INLINE void weigh(u64 v, i32 from) {
    const i32 stream = i32(id / kValueLanes * kValueBatch);
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
#pragma unroll
      for (u32 j = 0; j < 4 * kValueParts; ++j) o[r][j] = 0.0f;
    }
    uint4 words[kValueBatch][kValuePer];
#pragma unroll 1
    for (i32 step = from; step < range.end; step += i32(kValueStep)) {
#pragma unroll
      for (u32 i = 0; i < kValueBatch; ++i) {
#pragma unroll
        for (u32 j = 0; j < kValuePer; ++j) words[i][j] = v_words[i][j];
      }
      load_values(v, step + i32(kValueStep));
      float weights[kRows][kValueBatch];
#pragma unroll
      for (u32 r = 0; r < kRows; ++r) {
        const float* const row = shared.scores[r] + step + stream;
        if constexpr (kValueBatch == 4) {
          const float4 four = *reinterpret_cast<const float4*>(row);
          weights[r][0] = four.x;
          weights[r][1] = four.y;
          weights[r][2] = four.z;
          weights[r][3] = four.w;
        } else {
#pragma unroll
          for (u32 i = 0; i < kValueBatch; ++i) weights[r][i] = row[i];
        }
      }
#pragma unroll
      for (u32 i = 0; i < kValueBatch; ++i) {
#pragma unroll
        for (u32 j = 0; j < kValueParts; ++j) {
          const float4 vec = elements(words[i][j / kVecs], j % kVecs);
          const float x[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
          for (u32 r = 0; r < kRows; ++r) {
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
              float& sum = o[r][4 * j + e];
              if (!exact || weights[r][i] != 0.0f) sum = fmaf(weights[r][i], x[e], sum);
            }
          }
        }
      }
    }
  }

  // Adds o over the block, lanes first, then warps in ascending order, and writes it. Returns
  // whether a row that is not all NaN holds a NaN or Inf.
  KEYFOLD_INLINE bool write_rows(u32 split) {
    bool found = false;
    const u32 value_lane = id % kValueLanes;
#pragma unroll
    for (u32 r = 0; r < kRows; ++r) {
#pragma unroll
      for (u32 j = 0; j < kValueParts; ++j) {
        float sum[4];
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          sum[e] = o[r][4 * j + e];
#pragma unroll
          for (u32 mask = kValueLanes; mask < 32; mask *= 2) {
            sum[e] = sum[e] + __shfl_xor_sync(~0u, sum[e], mask);
          }
        }
        if (lane < kValueLanes) shared.o[warp][j][value_lane] = {sum[0], sum[1], sum[2], sum[3]};
      }
      __syncthreads();
      const float2 ml = shared.ml[r];
      if (first + r < params.index_end) {
        const u64 at = partial_index(params, blockIdx.z, split, first + r);
        const float2 marked = ml.y != 0.0f ? ml : float2{hidden(), -1.0f};
        if (id == 0) write(params.partial_ml + 8 * at, marked);
        for (u32 i = id; i < kValueLanes * kValueParts; i += kThreads) {
          const u32 j = i / kValueLanes, w = j / kVecs * kValueLanes + i % kValueLanes;
          if (w >= kValueWords) continue;
          float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (u32 s = 0; ml.y != 0.0f && s < kWarps; ++s) {
            const float4 part = shared.o[s][j][i % kValueLanes];
            sum[0] = s == 0 ? part.x : sum[0] + part.x;
            sum[1] = s == 0 ? part.y : sum[1] + part.y;
            sum[2] = s == 0 ? part.z : sum[2] + part.z;
            sum[3] = s == 0 ? part.w : sum[3] + part.w;
          }
#pragma unroll
          for (u32 e = 0; e < 4; ++e) found = found || (!is_nan(ml.y) && !is_finite(sum[e]));
          write(params.partial_o + (at * kValueVecs + w * kVecs + j % kVecs) * 16,
                positive_zeros(sum));
        }
      }
      __syncthreads();
    }
    return found;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Params params) {
  __shared__ alignas(16) unsigned char memory[sizeof(Shared)];
  static_assert(sizeof(Shared) <= 48 * 1024, "static shared memory");
  const u32 id = threadIdx.x;
  Thread t{params, *reinterpret_cast<Shared*>(memory), id, id / 32, id % 32};
  t.first = params.index_begin + blockIdx.x * kRows;
  const u32 split = blockIdx.y;
  const u32 group = params.group + blockIdx.z;
  const u32 batch_index = group / params.kv_heads, kv_head = group % params.kv_heads;
  const Batch batch = load_batch(params, batch_index);
  const u64 k = params.k + i64(batch_index) * params.k_batch + i64(kv_head) * params.k_head;
  const u64 v = params.v + i64(batch_index) * params.v_batch + i64(kv_head) * params.v_head;
  const i32 split_begin = i32((params.split + split) * kSplitLen);
  const auto in_split = [&](i32 key) { return clamped(key - split_begin, 0, i32(kSplitLen)); };

  const u32 index_last = smaller(t.first + kRows, params.index_end) - 1;
  t.range = {in_split(visible(batch, t.first / params.heads).begin),
             in_split(visible(batch, index_last / params.heads).end)};
  // No step is begun for the sake of its first keys.
  if (t.range.begin >= t.range.end) t.range = {0, 0};
  if (id < kRows) {
    const Range range = visible(batch, (t.first + id) / params.heads);
    const bool inside = t.first + id < params.index_end;
    t.shared.range[id] = inside ? Range{in_split(range.begin), in_split(range.end)} : Range{0, 0};
  }
  if (id == 0) t.shared.redo = 0;
  t.load_q(group);
  __syncthreads();
  const u64 split_k = k + i64(split_begin) * params.k_key;
  const u64 split_v = v + i64(split_begin) * params.v_key;
  const i32 from = t.range.begin / i32(kHeadStep) * i32(kHeadStep);
  const i32 value_from = t.range.begin / i32(kValueStep) * i32(kValueStep);
  const bool any = t.range.begin < t.range.end;
  if (any) t.score_keys(split_k, batch_index, group, split_begin, from);
  if (any) t.load_values(split_v, value_from);  // on their way during the softmax
  __syncthreads();
  t.soften(from, value_from);
  __syncthreads();
  t.weigh<false>(split_v, value_from);
  if (t.write_rows(split)) t.shared.redo = 1;
  __syncthreads();
  if (t.shared.redo == 0) return;
  if (any) t.load_values(split_v, value_from);
  t.weigh<true>(split_v, value_from);
  t.write_rows(split);
}

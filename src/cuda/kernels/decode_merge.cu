// Folds the partial states that decode_mma.cu leaves into the states in memory, or to results. A
// block has some columns (y, all in turn where there are fewer) of a row (x) of a group (z), and as
// many splits at a time as it has threads for. The units of a split are merged as a tree, splits
// are folded in ascending order: so that few steps wait for each other.
#include "decode_results.cuh"

constexpr u32 kLanes = 8;  // that share a split, four columns each
constexpr u32 kColumns = 4 * kLanes;
constexpr u32 kMostSplits = kThreads / kLanes;  // at a time

KEYFOLD_INLINE float larger_or_nan(float a, float b) { return a > b || is_nan(a) ? a : b; }

// Of the units of a split.
KEYFOLD_INLINE Sum merge_units(const Params& p, u32 group, u32 index, Range units, i32 split,
                               u32 column) {
  Sum of[kUnits];
#pragma unroll
  for (i32 i = 0; i < kUnits; ++i) {
    const i32 unit = split * kUnits + i;
    of[i] = {{hidden(), -1.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    if (unit < units.begin || unit >= units.end) continue;
    of[i].ml = read_float2(p.partial_ml + 8 * unit_index(p, group, unit, index));
  }
#pragma unroll
  for (i32 i = 0; i < kUnits; ++i) {
    if (of[i].ml.y < 0.0f) continue;  // no key, or its state is with another's
    const u64 part = unit_index(p, group, split * kUnits + i, index);
    of[i].o = read_float4(p.partial_o + 4 * (part * kValueDim + column));
  }
#pragma unroll
  for (i32 span = 1; span < kUnits; span *= 2) {
#pragma unroll
    for (i32 i = 0; i < kUnits; i += 2 * span) join(of[i], of[i + span]);
  }
  const float o[4] = {of[0].o.x, of[0].o.y, of[0].o.z, of[0].o.w};
  of[0].o = positive_zeros(o);
  return of[0];
}

// Folds n splits, 32 at most, into a row, in order. A lane finds the factors of its split, for
// which it has to know of those before no more than their maximum; what is left to do one by one is
// multiply and add.
KEYFOLD_INLINE void fold(float2& ml, float4& o, const Sum (*sums)[kLanes], i32 n, u32 lane) {
  const bool mine = i32(lane) < n;
  const float2 part = sums[mine ? lane : 0][0].ml;
  const bool empty = !mine || part.y < 0.0f;
  float most = larger_or_nan(empty ? hidden() : part.x, ml.x);
#pragma unroll
  for (u32 i = 1; i < 32; i *= 2) {
    const float before = __shfl_up_sync(~0u, most, i);
    if (lane >= i) most = larger_or_nan(most, before);
  }
  float before = __shfl_up_sync(~0u, most, 1);
  if (lane == 0) before = ml.x;
  const float keep = exp_nonpositive(before - base_of(most));
  const float add = exp_nonpositive(part.x - base_of(most));
  const bool nothing = empty || add == 0.0f;
  for (i32 i = 0; i < n; ++i) {
    const Factors f{__shfl_sync(~0u, nothing ? 1.0f : keep, i),
                    __shfl_sync(~0u, nothing ? 0.0f : add, i)};
    const Sum later = sums[i][lane % kLanes];
    ml.y = merge_values(ml.y, later.ml.y, f);
    o = merge_values(o, later.o, f);
  }
  ml.x = __shfl_sync(~0u, most, n - 1);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    decode_merge(const __grid_constant__ Params p, const __grid_constant__ Ends ends) {
  __shared__ Sum sums[kMostSplits][kLanes];
  const u32 lane = threadIdx.x % 32, column4 = 4 * (threadIdx.x % kLanes);
  const i32 mine = i32(threadIdx.x / kLanes), at_once = i32(blockDim.x / kLanes);
  const u32 group = p.group + blockIdx.z, index = p.index_begin + blockIdx.x;
  const Range units = units_of(p, load_batch(p, group / p.kv_heads));
  const bool ended = ends.out.at != 0;
  if (units.begin == units.end && !ends.begins && !ended) return;
  const i32 split_end = (units.end + kUnits - 1) / kUnits;
  const u64 at = state_index(p, group, index);
  await_previous();
  float2 before{hidden(), 0.0f};
  if (!ends.begins) before = read_float2(p.ml + 8 * at);
#pragma unroll 1
  for (u32 first = kColumns * blockIdx.y; first < kValueDim; first += kColumns * gridDim.y) {
    const u32 column = smaller(first + column4, kValueDim - 4);
    const u64 place = p.o + 4 * (at * kValueDim + column);
    float2 ml = before;
    float4 o{0.0f, 0.0f, 0.0f, 0.0f};
    if (!ends.begins) o = read_float4(place);
#pragma unroll 1
    for (i32 begin = units.begin / kUnits; begin < split_end; begin += at_once) {
      const i32 split = begin + mine;
      if (split < split_end) {
        sums[mine][column4 / 4] = merge_units(p, group, index, units, split, column);
      }
      __syncthreads();
      const i32 n = smaller(at_once, split_end - begin);
      for (i32 i = 0; threadIdx.x < 32 && i < n; i += 32) {
        fold(ml, o, sums + i, smaller(32, n - i), lane);
      }
      __syncthreads();
    }
    if (threadIdx.x >= kLanes) continue;
    const bool last = lane == 0 && first + kColumns >= kValueDim;
    if (!ended) {
      if (first + column4 < kValueDim) write(place, o);
      if (last) write(p.ml + 8 * at, ml);
      continue;
    }
    write_result(p, ends, group, index, first + column4, ml, o, last);
  }
}

// Folds a wave's partial states into the running states, split after split in ascending order. What
// the fold of a split has to know of those before it is only their maximum, so that the factors of
// many splits are found side by side; what follows one by one is a multiplication and a fma.
#include "common.cuh"
#include "results.cuh"

// A block is kRows rows of kLanes threads, each for four columns at a time.
constexpr u32 kRows = KEYFOLD_ROWS;
constexpr u32 kLanes = KEYFOLD_LANES;
constexpr u32 kAhead = KEYFOLD_AHEAD;  // partial states that are loaded together
constexpr u32 kBatch = 64;             // splits whose factors are found together

// The state's m with a later split.
KEYFOLD_INLINE float with(float m, float2 part) {
  return part.y < 0.0f || m > part.x || is_nan(m) ? m : part.x;
}

KEYFOLD_INLINE Factors factors_of(float before, float most, float2 part) {
  const Factors f{exp_nonpositive(before - base_of(most)), exp_nonpositive(part.x - base_of(most))};
  return part.y < 0.0f || f.add == 0.0f ? Factors{1.0f, 0.0f} : f;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    merge(const __grid_constant__ Params params, const __grid_constant__ Ends ends) {
  __shared__ float2 s_part[kRows][kBatch];      // (m, l) of the splits
  __shared__ Factors s_factors[kRows][kBatch];  // (1, 0) keeps the state as it is
  const u32 lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  const u32 index = params.index_begin + blockIdx.x * kRows + row;
  const u32 group = params.group + blockIdx.z;
  const bool inside = index < params.index_end;
  const u64 at = state_index(params, group, index);
  const u32 batch = group / params.kv_heads, kv_head = group % params.kv_heads;
  const u32 head = index % params.heads, query = index / params.heads;
  await_previous();
  float2 state{hidden(), 0.0f};
  if (inside && !ends.begins) state = read_float2(params.ml + 8 * at);
  // Of the row's partial states: the first, and the way from one to the next.
  const u32 num_splits = params.num_splits;
  const u64 first_part = partial_index(params, blockIdx.z, 0, index);
  const u64 step = params.index_end - params.index_begin;
  const u64 part_ml = params.partial_ml + 8 * first_part;
  const u64 part_o = params.partial_o + 4 * kValueDim * first_part;
  for (u32 first = 0; first < num_splits; first += kBatch) {
    const u32 count = smaller(kBatch, num_splits - first);
    __syncthreads();  // all have read the last batch, and the state that is written below
    for (u32 i = lane; inside && i < count; i += kLanes) {
      s_part[row][i] = read_float2(part_ml + 8 * step * (first + i));
    }
    __syncthreads();
    for (u32 i = lane; inside && i < (count + kAhead - 1) / kAhead * kAhead; i += kLanes) {
      s_factors[row][i] = {1.0f, 0.0f};
      if (i >= count) continue;
      float before = state.x;
      for (u32 j = 0; j < i; ++j) before = with(before, s_part[row][j]);
      const float2 part = s_part[row][i];
      s_factors[row][i] = factors_of(before, with(before, part), part);
    }
    __syncthreads();
    for (u32 i = 0; inside && i < count; ++i) {
      const float2 part = s_part[row][i];
      state.x = with(state.x, part);
      state.y = merge_values(state.y, part.y, s_factors[row][i]);
    }
    const bool ended = ends.out.at != 0 && first + count == num_splits && inside;
    End end{};
    if (ended) end = end_of(ends, state.x, state.y, kv_head * params.heads + head);
    for (u32 column = 4 * lane; inside && column < kValueDim; column += 4 * kLanes) {
      const u64 place = params.o + (at * kValueDim + column) * 4;
      float4 o{0.0f, 0.0f, 0.0f, 0.0f};
      if (first != 0 || !ends.begins) o = read_float4(place);
#pragma unroll 1
      for (u32 begin = 0; begin < count; begin += kAhead) {
        float4 later[kAhead];
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) {
          // What has no part in the sum may never have been written.
          later[i] = {0.0f, 0.0f, 0.0f, 0.0f};
          if (s_factors[row][begin + i].add == 0.0f) continue;
          const u64 split = first + begin + i;
          later[i] = read_float4(part_o + 4 * (kValueDim * step * split + column));
        }
#pragma unroll
        for (u32 i = 0; i < kAhead; ++i) o = merge_values(o, later[i], s_factors[row][begin + i]);
      }
      if (ended) {
        write_results(ends, end, address_of(ends.out, batch, kv_head, head, query), column, o);
      } else {
        write(place, o);
      }
    }
    if (ended && lane == 0) write_lse(ends, end, batch, kv_head, head, query);
  }
  if (inside && lane == 0 && ends.out.at == 0) write(params.ml + 8 * at, state);
}

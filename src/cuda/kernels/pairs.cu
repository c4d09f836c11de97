// Makes pairs of float16 of a wave's keys and values, for wgmma3.cu: a block for each tile.
#include "pairs.cuh"

KEYFOLD_INLINE void write_half(u64 address, uint2 x) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(x.x), "r"(x.y) : "memory");
}

// A row in lanes: kLanes of them have each its every kLanes-th word of four elements.
template <u32 kDim, u32 kWidth, u32 kLanes>
struct Row {
  static constexpr u32 kWords = kWidth / 4, kVectors = (kWords + kLanes - 1) / kLanes;
  float4 x[kVectors];

  KEYFOLD_INLINE void load(u64 address, bool there, u32 lane) {
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      const u32 word = lane + i * kLanes;
      x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (there && word < kDim / 4) x[i] = elements(load_words(address + 16 * word), 0);
    }
  }
  KEYFOLD_INLINE void store(u64 tile, u32 row, float scale, u32 lane) const {
    constexpr u32 kPart = kWidth / 64 * kKeyPanel;
#pragma unroll
    for (u32 i = 0; i < kVectors; ++i) {
      if (lane + i * kLanes >= kWords) continue;
      const Pair pair = split(scale == 0.0f ? float4{0.0f, 0.0f, 0.0f, 0.0f} : x[i], scale);
      const u64 place = tile + place_in_panels(row, lane + i * kLanes, kKeyPanel);
      write_half(place, pair.high);
      write_half(place + kPart, pair.low);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads)
    pairs(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  constexpr u32 kLanes = kHeadWidth == 64 && kValueWidth == 64 ? 16 : 32;
  constexpr u32 kHeadLanes = kHeadWidth == 64 ? 16 : kLanes;
  constexpr u32 kValueLanes = kValueWidth == 64 ? 16 : kLanes;
  __shared__ u32 odd[4];  // K's, then V's
  if (threadIdx.x < 4) odd[threadIdx.x] = 0;
  __syncthreads();
  const u32 group = p.group + blockIdx.y, batch = group / p.kv_heads, kv_head = group % p.kv_heads;
  const u64 k = p.k + batch * p.k_batch + kv_head * p.k_head;
  const u64 v = p.v + batch * p.v_batch + kv_head * p.v_head;
  const u64 tile = jobs.pairs + (u64(blockIdx.y) * gridDim.x + blockIdx.x) * kTileBytes;
  const u64 record = tile + kRecordAt;
  const i32 limit = load_batch(p, batch).limit;
  const u32 lane = threadIdx.x % kLanes;
#pragma unroll 2
  for (u32 i = threadIdx.x / kLanes; i < kKeys; i += kThreads / kLanes) {
    const i32 key = i32((p.split * kSplitTiles + blockIdx.x) * kKeys + i);
    Row<kHeadDim, kHeadWidth, kHeadLanes> k_row;
    Row<kValueDim, kValueWidth, kValueLanes> v_row;
    const u32 k_lane = lane % kHeadLanes, v_lane = lane % kValueLanes;
    k_row.load(k + key * p.k_key, key < limit, k_lane);
    v_row.load(v + key * p.v_key, key < limit, v_lane);
    const RowExponent of_k = exponent_of<kHeadLanes>(k_row.x);
    const RowExponent of_v = exponent_of<kValueLanes>(v_row.x);
    // V's in steps of 2^8: most often none of its keys asks for another factor than 1.
    const i32 v_exponent = of_v.odd ? 0 : (of_v.exponent + 3) >> 3 << 3;
    if (lane == k_lane) {
      k_row.store(tile, i, of_k.odd ? 0.0f : power_of_two(kTop - of_k.exponent), k_lane);
    }
    if (lane == v_lane) {
      v_row.store(tile + kValuesAt, i, of_v.odd ? 0.0f : power_of_two(kValueTop - v_exponent),
                  v_lane);
    }
    if (lane != 0) continue;
    write(record + factor_at(i), of_k.odd ? 0.0f : power_of_two(of_k.exponent - kTop));
    write(record + bias_at(i), float(v_exponent) * kLn2);
    write(record + unit_at(i), power_of_two(-v_exponent - kWeightBits));
    if (of_k.odd) atomicOr(&odd[i / 32], 1u << i % 32);
    if (of_v.odd) atomicOr(&odd[2 + i / 32], 1u << i % 32);
  }
  __syncthreads();
  if (threadIdx.x < 4) write_word(record + kOddKeysAt + 4 * threadIdx.x, odd[threadIdx.x]);
}

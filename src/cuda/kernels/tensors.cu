// What brings tensors into a run and its result out, on the device: rows to where the kernels of
// attention read them, what the batch entries see, and states to results. src/cuda/tensors.hpp has
// the twins of the structs.
#include "results.cuh"

constexpr u32 kDType = KEYFOLD_DTYPE;  // of q, k, v and out: 0 float32, 1 float16, 2 bfloat16
constexpr u32 kWarps = 8;              // of a block; each takes a row

// Rows of groups [group, ...): of each group `indices`, with the `heads` of a row innermost.
struct Place {
  u32 group, kv_heads, heads, indices;
  u64 count;  // rows of all groups
};
struct Row {
  u32 batch, kv_head, head, row;
};

KEYFOLD_INLINE u64 row_number() { return u64(blockIdx.x) * kWarps + threadIdx.x / 32; }
KEYFOLD_INLINE Row row_of(const Place& place, u64 i) {
  const u32 group = place.group + u32(i / place.indices), index = u32(i % place.indices);
  return {group / place.kv_heads, group % place.kv_heads, index % place.heads, index / place.heads};
}
KEYFOLD_INLINE u64 address_of(const TensorRows& rows, const Row& row) {
  return address_of(rows, row.batch, row.kv_head, row.head, row.row);
}

// Strided rows to dense ones, padded with zeros. Where o is given, the states of the rows become
// empty.
struct Gather {
  Place place;
  TensorRows from;
  u64 to;     // or 0
  u64 o, ml;  // the states of these rows, or 0
  u32 dim, padded_dim, padded_value_dim;
};
template <class T>
KEYFOLD_INLINE void copy_row(const Gather& g, u64 i, u32 lane) {
  const u64 from = address_of(g.from, row_of(g.place, i));
  T* const to = reinterpret_cast<T*>(g.to) + i * g.padded_dim;
  for (u32 d = lane; d < g.padded_dim; d += 32)
    to[d] = d < g.dim ? *reinterpret_cast<const T*>(from + i64(d) * g.from.column) : T(0);
}
extern "C" __global__ void __launch_bounds__(32 * kWarps) gather(const __grid_constant__ Gather g) {
  const u64 i = row_number();
  const u32 lane = threadIdx.x % 32;
  if (i >= g.place.count) return;
  if (g.to != 0) {
    if constexpr (kDType == 0) copy_row<u32>(g, i, lane);
    if constexpr (kDType != 0) copy_row<u16>(g, i, lane);
  }
  if (g.o == 0) return;
  float* const o = reinterpret_cast<float*>(g.o) + i * g.padded_value_dim;
  for (u32 d = lane; d < g.padded_value_dim; d += 32) o[d] = 0.0f;
  float* const ml = reinterpret_cast<float*>(g.ml) + 2 * i;
  if (lane < 2) ml[lane] = lane == 0 ? __uint_as_float(0xff800000u) : 0.0f;
}

// As in params.cuh.
struct Batch {
  i32 first, last, limit;
};
constexpr u32 kMostBatches = 256;  // of a launch

// What the batch entries see, as the host knows it.
struct KnownBatches {
  u64 to;
  u32 count;
  Batch batch[kMostBatches];
};
extern "C" __global__ void known_batches(const __grid_constant__ KnownBatches b) {
  if (threadIdx.x < b.count) reinterpret_cast<Batch*>(b.to)[threadIdx.x] = b.batch[threadIdx.x];
}

// The same from lengths on the device.
struct LengthBatches {
  u64 to, lengths;
  i64 kv_len, q_len;
  i64 q_offset;     // of every entry, if given
  i64 left, right;  // of the window, which has them if they are not negative
  i64 row;          // the block's first
  i64 key;          // the chunk's first
  u32 num_keys, count;
  u32 q_offset_given;
};
KEYFOLD_INLINE i64 clamped(i64 x, i64 least, i64 most) {
  return x < least ? least : x > most ? most : x;
}
extern "C" __global__ void length_batches(const __grid_constant__ LengthBatches b) {
  constexpr i64 kFar = i64(1) << 30;
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= b.count) return;
  const i64 length = clamped(reinterpret_cast<const i32*>(b.lengths)[i], 0, b.kv_len);
  const i64 row = (b.q_offset_given ? b.q_offset : length - b.q_len) + b.row - b.key;
  Batch batch{-i32(kFar), i32(kFar), i32(clamped(length - b.key, 0, b.num_keys))};
  if (b.left >= 0) batch.first = i32(clamped(row - b.left, -kFar, kFar));
  if (b.right >= 0) batch.last = i32(clamped(row + b.right + 1, -kFar, kFar));
  reinterpret_cast<Batch*>(b.to)[i] = batch;
}

// States to results.
struct Finish {
  Place place;
  u64 o, ml;
  Ends ends;
  u64 padded_value_dim;
};
extern "C" __global__ void __launch_bounds__(32 * kWarps) finish(const __grid_constant__ Finish f) {
  const u64 i = row_number();
  const u32 lane = threadIdx.x % 32;
  if (i >= f.place.count) return;
  const Row row = row_of(f.place, i);
  const float* const ml = reinterpret_cast<const float*>(f.ml) + 2 * i;
  const End end = end_of(f.ends, ml[0], ml[1], row.kv_head * f.place.heads + row.head);
  __syncwarp();  // what was read may be written below
  const float* const o = reinterpret_cast<const float*>(f.o) + i * f.padded_value_dim;
  const u64 out = address_of(f.ends.out, row);
  for (u32 d = lane; d < f.ends.value_dim; d += 32) {
    write_element(out + i64(d) * f.ends.out.column, result_of(end, o[d]), f.ends.out_type);
  }
  if (lane == 0) write_lse(f.ends, end, row.batch, row.kv_head, row.head, row.row);
}

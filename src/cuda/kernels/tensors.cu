// What brings tensors into a run and its result out, on the device: rows to where the kernels of
// attention read them, what the batch entries see, and states to results. src/cuda/tensors.hpp has
// the twins of the structs. Strides count bytes.
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr u32 kDType = KEYFOLD_DTYPE;  // of q, k, v and out: 0 float32, 1 float16, 2 bfloat16
constexpr u32 kWarps = 8;              // of a block; each takes a row

// Rows of groups [group, ...): of each group `indices`, with the `heads` of a row innermost.
struct Rows {
  u64 at;  // of batch entry 0, group 0, head 0, row 0
  i64 batch, group, head, row, column;
};
struct Place {
  u32 group, kv_heads, heads, indices;
  u64 count;  // rows of all groups
};

__device__ __forceinline__ u64 row_number() { return u64(blockIdx.x) * kWarps + threadIdx.x / 32; }
__device__ __forceinline__ u64 address_of(const Rows& rows, const Place& place, u64 i) {
  const u32 group = place.group + u32(i / place.indices), index = u32(i % place.indices);
  return rows.at + i64(group / place.kv_heads) * rows.batch +
         i64(group % place.kv_heads) * rows.group + i64(index % place.heads) * rows.head +
         i64(index / place.heads) * rows.row;
}

// Strided rows to dense ones, padded with zeros. Where o is given, the states of the rows become
// empty.
struct Gather {
  Place place;
  Rows from;
  u64 to;
  u64 o, ml;  // the states of these rows, or 0
  u32 dim, padded_dim, padded_value_dim;
};
template <class T>
__device__ __forceinline__ void copy_row(const Gather& g, u64 i, u32 lane) {
  const u64 from = address_of(g.from, g.place, i);
  T* const to = reinterpret_cast<T*>(g.to) + i * g.padded_dim;
  for (u32 d = lane; d < g.padded_dim; d += 32)
    to[d] = d < g.dim ? *reinterpret_cast<const T*>(from + i64(d) * g.from.column) : T(0);
}
extern "C" __global__ void __launch_bounds__(32 * kWarps) gather(const __grid_constant__ Gather g) {
  const u64 i = row_number();
  const u32 lane = threadIdx.x % 32;
  if (i >= g.place.count) return;
  if constexpr (kDType == 0) copy_row<u32>(g, i, lane);
  if constexpr (kDType != 0) copy_row<u16>(g, i, lane);
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
__device__ __forceinline__ i64 clamped(i64 x, i64 least, i64 most) {
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

// float16 and bfloat16 as in src/core/half.hpp, NaN included.
__device__ __forceinline__ u16 bfloat16_bits(float value) {
  const u32 bits = __float_as_uint(value);
  if (value != value) return u16((bits >> 16) | 0x40);
  return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ __forceinline__ u16 float16_bits(float value) {
  const u32 bits = __float_as_uint(value);
  const u32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return u16(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return u16(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // subnormal: 0.5 leaves the rounded multiple of 2^-24 below
    return u16(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return u16(sign | ((magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13));
}
__device__ __forceinline__ float float16_value(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
template <u32 dtype>
__device__ __forceinline__ float load(u64 at) {
  if constexpr (dtype == 0) return *reinterpret_cast<const float*>(at);
  const u16 bits = *reinterpret_cast<const u16*>(at);
  return dtype == 1 ? float16_value(bits) : __uint_as_float(u32(bits) << 16);
}

// States to results: the end of a row as in src/core/normalise.hpp.
struct Finish {
  Place place;
  u64 o, ml;
  Rows out;
  Rows lse;   // at 0: none
  u64 sinks;  // one a head, or 0
  i64 sink_step;
  u32 sinks_wide;  // float32, rather than the dtype
  u32 out_wide;    // likewise
  u32 value_dim, padded_value_dim;
};
extern "C" __global__ void __launch_bounds__(32 * kWarps) finish(const __grid_constant__ Finish f) {
  const u64 i = row_number();
  const u32 lane = threadIdx.x % 32;
  if (i >= f.place.count) return;
  const float nothing = __uint_as_float(0xff800000u);
  float m = reinterpret_cast<const float*>(f.ml)[2 * i];
  float l = reinterpret_cast<const float*>(f.ml)[2 * i + 1], weight = 1.0f;
  __syncwarp();  // what was read may be written below
  if (f.sinks != 0) {
    const u32 group = f.place.group + u32(i / f.place.indices);
    const u32 head = group % f.place.kv_heads * f.place.heads + u32(i % f.place.heads);
    const u64 at = f.sinks + i64(head) * f.sink_step;
    const float sink = f.sinks_wide ? load<0>(at) : load<kDType>(at);
    const float most = m > sink || m != m ? m : sink;
    if (most != nothing) {
      weight = expf(m - most);
      l = l * weight + (sink == most ? 1.0f : expf(sink - most));  // also for +Inf
      m = most;
    }
  }
  const float* const o = reinterpret_cast<const float*>(f.o) + i * f.padded_value_dim;
  const u64 out = address_of(f.out, f.place, i);
  for (u32 d = lane; d < f.value_dim; d += 32) {
    // A weight of 0 leaves even Inf out. + 0: a zero has no sign.
    const float x = l == 0.0f || weight == 0.0f ? 0.0f : weight * o[d] / l + 0.0f;
    const u64 to = out + i64(d) * f.out.column;
    if (kDType == 0 || f.out_wide) {
      *reinterpret_cast<float*>(to) = x;
    } else {
      *reinterpret_cast<u16*>(to) = kDType == 1 ? float16_bits(x) : bfloat16_bits(x);
    }
  }
  if (f.lse.at != 0 && lane == 0) {
    *reinterpret_cast<float*>(address_of(f.lse, f.place, i)) = l == 0.0f ? nothing : m + logf(l);
  }
}

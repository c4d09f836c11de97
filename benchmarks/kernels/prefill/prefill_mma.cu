// Prefill for GPUs from sm_80 on, and for float32 on all: each warp folds tiles of keys into its
// rows by mma.sync, while cp.async brings the next tile; after FlashAttention-2 (Dao, 2023).
//
// float32 products are three products of tf32: with a = a_high + a_low, a b = a_high b_high +
// a_high b_low + a_low b_high + what is below float32's last bit (Markidis et al., 2018). Tensor
// cores round sums toward zero, which adds up to a bias over many keys: so they sum 16 terms at
// most, the small ones first, and the rest is added by rounding to nearest (Ootomo and Yokota,
// 2022).
//
// The fold goes on from the state in memory, tile of keys after tile of keys, counted from key 0:
// where a chunk ends changes nothing. Tiles that no row of a tile sees are left out: they would
// change nothing.
//
// Set by the host, besides fold.cuh's: KF_HEAD_DIM, KF_VALUE_DIM (in memory: whole 16 bytes),
// KF_KEYS of a tile, KF_STAGES, KF_ROW_WARPS, KF_COLUMN_WARPS (parts of V's columns; each computes
// all scores), KF_BLOCKS (of 16 rows, of a warp), KF_RESIDENT (blocks of threads that share a
// multiprocessor).
#include "fold.cuh"
#include "mma.cuh"

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

constexpr int kKeys = KF_KEYS, kStages = KF_STAGES, kAhead = kStages - 1, kBlocks = KF_BLOCKS;
constexpr int kRowWarps = KF_ROW_WARPS, kColumnWarps = KF_COLUMN_WARPS;
constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
constexpr int kWarpRows = 16 * kBlocks, kRows = kWarpRows * kRowWarps;
constexpr int kElement = kFloat32 ? 4 : 2, kLine = 128 / kElement;
constexpr int kHeadDim = round_up(KF_HEAD_DIM, 16);
// Of a warp. A part of several begins at a line's begin.
constexpr int kValueUnit = kColumnWarps > 1 ? kLine : kFloat32 ? 32 : 16;
constexpr int kValues = round_up((KF_VALUE_DIM + kColumnWarps - 1) / kColumnWarps, kValueUnit);
// Rows of tiles in shared memory: whole lines of 128 bytes; the 16-byte word w of row r lies at
// w ^ (r % 8). Words behind a row's end stay zero.
constexpr uint kHeadBytes = round_up(kHeadDim, kLine) * kElement;
constexpr uint kValueBytes = round_up(kValues * kColumnWarps, kLine) * kElement;
constexpr int kHeadWords = KF_HEAD_DIM * kElement / 16, kValueWords = KF_VALUE_DIM * kElement / 16;
constexpr uint kQueryTile = kRows * kHeadBytes;
constexpr uint kKeyTile = kKeys * kHeadBytes, kValueTile = kKeys * kValueBytes;
constexpr uint kSharedBytes = kQueryTile + kStages * (kKeyTile + kValueTile) + kRows * 16;
using Layout = conditional<kFloat32, Quads, Pairs>;
static_assert(KF_SPLIT_LEN % KF_KEYS == 0 && KF_KEYS % 16 == 0);
static_assert(KF_HEAD_DIM * kElement % 16 == 0 && KF_VALUE_DIM * kElement % 16 == 0);

// What a row sees, in shared memory, as few tiles ask for it.
struct alignas(16) RowLimits {
  int begin, end;
  uint64 mask;
};

DEVICE uint word_at(uint row, uint word, uint pitch) {
  return row * pitch + ((word ^ (row % 8)) << 4);
}

// Copies kCount rows of kWords words, of which `valid` are there.
template <int kCount, int kWords, uint kPitch>
DEVICE void copy_tile(uint to, uint64 from, int64 step, int valid) {
  if constexpr (kThreads % kWords == 0) {
    constexpr int kAtOnce = kThreads / kWords;
    const int row = threadIdx.x / kWords;
    const uint word = threadIdx.x % kWords;
    uint64 at = from + row * step + 16 * word;
#pragma unroll
    for (int i = 0; i < kCount; i += kAtOnce, at += kAtOnce * step) {
      if (kCount % kAtOnce != 0 && row + i >= kCount) break;
      copy_16(to + word_at(row + i, word, kPitch), reinterpret_cast<const void*>(at),
              row + i < valid);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < kCount * kWords; i += kThreads) {
      const int row = i / kWords, word = i % kWords;
      copy_16(to + word_at(row, word, kPitch),
              reinterpret_cast<const void*>(from + row * step + 16 * word), row < valid);
    }
  }
}

// Where a lane reads the four matrices of 16 rows and two words of a tile, by the column of 16-byte
// words: rows first (Q; V transposed), or words first (K). `step` moves on by two words.
DEVICE uint rows_first(uint tile, uint pitch, uint lane) {
  return tile + word_at(lane % 16, lane / 16, pitch);
}
DEVICE uint words_first(uint tile, uint pitch, uint lane) {
  return tile + word_at(lane / 16 * 8 + lane % 8, lane / 8 % 2, pitch);
}
DEVICE uint step(uint address, int i) { return (address ^ (32 * (i % 4))) + 128 * (i / 4); }

using Scores = float[kBlocks][kKeys / 2];
using Values = float[kBlocks][kValues / 2];

#ifndef KF_FLOAT32
// s = q k^T.
DEVICE void compute_scores(Scores& s, uint q, uint k) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[b][i] = 0;
  }
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint left[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) load_matrices(left[b], step(q, i) + b * 16 * kHeadBytes);
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint right[4];
      load_matrices(right, step(k, i) + j * 16 * kHeadBytes);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        multiply(s[b] + 8 * j, left[b], right[0], right[1]);
        multiply(s[b] + 8 * j + 4, left[b], right[2], right[3]);
      }
    }
  }
}

// o = alpha o + weights v.
DEVICE void add_values(Values& o, const Scores& s, const float (&alpha)[kBlocks][2], uint v,
                       int pass) {
  uint w[kBlocks][kKeys / 4];
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    pack_weights(s[b], w[b], pass);
    if (!__any_sync(~0u, alpha[b][0] != 1 || alpha[b][1] != 1)) continue;  // as in most tiles
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) o[b][i] *= alpha[b][i / 2 % 2];
  }
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kValues / 16; ++j) {
      uint right[4];
      load_transposed(right, step(v, j) + i * 16 * kValueBytes);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint left[4] = {w[b][4 * i], w[b][4 * i + 1], w[b][4 * i + 2], w[b][4 * i + 3]};
        multiply(o[b] + 8 * j, left, right[0], right[1]);
        multiply(o[b] + 8 * j + 4, left, right[2], right[3]);
      }
    }
  }
}
#else
struct Split {
  uint high[4], low[4];
};
// d = a b over 16 terms: two products of 8 for each block and each n of four.
template <int kN>
DEVICE void multiply_split(float (&d)[kBlocks][kN][4], const Split (&a)[kBlocks][2],
                           const uint (&b)[2][kN][2]) {
  uint high[2][kN][2], low[2][kN][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) split_down(b[i][n][e], high[i][n][e], low[i][n][e]);
    }
  }
#pragma unroll
  for (int term = 0; term < 6; ++term) {
    const int i = term % 2, kind = term / 2;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint(&right)[2] = kind == 0 ? low[i][n] : high[i][n];
        multiply_tf32(d[m][n], kind == 1 ? a[m][i].low : a[m][i].high, right[0], right[1],
                      term > 0);
      }
    }
  }
}

DEVICE void compute_scores(Scores& s, uint q, uint k) {
  constexpr int kN = kKeys % 32 == 0 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; i += 2) {
    Split left[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint x[4];
        load_matrices(x, step(q, i + h) + b * 16 * kHeadBytes);
#pragma unroll
        for (int e = 0; e < 4; ++e) split_nearest(x[e], left[b][h].high[e], left[b][h].low[e]);
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; j += kN) {
      uint right[2][kN][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
          uint x[4];
          load_matrices(x, step(k, i + h) + (j + n) * 8 * kHeadBytes);
#pragma unroll
          for (int e = 0; e < 4; ++e) right[h][n + e / 2][e % 2] = x[e];
        }
      }
      float part[kBlocks][kN][4];
      multiply_split(part, left, right);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int e = 0; e < 4 * kN; ++e) {
          float& at = s[b][4 * j + e];
          at = i == 0 ? part[b][e / 4][e % 4] : at + part[b][e / 4][e % 4];
        }
      }
    }
  }
}

// Key 2t of eight is a product's k = t, key 2t + 1 its k = t + 4: so weights stay where they are.
// Columns 4g to 4g + 3 of 32 are n = g of four products: so V is read by 16 bytes.
DEVICE void add_values(Values& o, const Scores& s, const float (&alpha)[kBlocks][2], uint v,
                       int pass) {
  const uint t = threadIdx.x % 4, g = threadIdx.x / 4 % 8;
  const uint even = v + word_at(2 * t, g, kValueBytes);
  const uint odd = v + word_at(2 * t + 1, g, kValueBytes);
#pragma unroll
  for (int i = 0; i < kKeys / 8; i += 2) {
    Split left[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float x = s[b][4 * (i + h) + (e % 2 * 2 + e / 2)];
          if (KF_CAREFUL) x = pass_weight(x, pass);
          split_nearest(__float_as_uint(x), left[b][h].high[e], left[b][h].low[e]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kValues / 32; ++j) {
      uint right[2][4][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint x[4], y[4];
        load_words(x, even + (i + h) * 8 * kValueBytes + 128 * j);
        load_words(y, odd + (i + h) * 8 * kValueBytes + 128 * j);
#pragma unroll
        for (int n = 0; n < 4; ++n) right[h][n][0] = x[n], right[h][n][1] = y[n];
      }
      float part[kBlocks][4][4];
      multiply_split(part, left, right);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          float& at = o[b][16 * j + e];
          at = i == 0 ? fmaf(at, alpha[b][e / 2 % 2], part[b][e / 4][e % 4])
                      : at + part[b][e / 4][e % 4];
        }
      }
    }
  }
}
#endif

extern "C" __global__ void __launch_bounds__(kThreads, KF_RESIDENT)
    prefill(const __grid_constant__ Params p, const __grid_constant__ Tiles tiles) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint q = shared_address(shared), k = q + kQueryTile, v = k + kStages * kKeyTile;
  RowLimits* const row_limits =
      reinterpret_cast<RowLimits*>(shared + kQueryTile + kStages * (kKeyTile + kValueTile));
  const uint lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint row = warp % kRowWarps * kWarpRows + lane / 4;  // of the tile; and row + 8 and so on
  const int column = warp / kRowWarps * kValues;             // the first of the warp
  const uint my_q = rows_first(q + warp % kRowWarps * kWarpRows * kHeadBytes, kHeadBytes, lane);
  const uint my_k = words_first(k, kHeadBytes, lane);
  const uint my_v = (kFloat32 ? v : rows_first(v, kValueBytes, lane)) + column * kElement;

  for (uint i = threadIdx.x; i < kSharedBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  }
  Job job;
  for (uint i = 0; job_of<kRows, kKeys, 1>(p, tiles, i, job); ++i) {
    if (job.skip) continue;
    __syncthreads();  // shared memory is free
    copy_tile<kRows, kHeadWords, kHeadBytes>(
        q,
        p.q + (uint64(job.group - p.block_group) * p.block_indices + job.first) *
                  (KF_HEAD_DIM * kElement),
        KF_HEAD_DIM * kElement, p.index_end - job.first);
    for (int r = threadIdx.x; r < kRows; r += kThreads) {
      const uint index = min(job.first + r, p.index_end - 1);
      const int2 range = visible(job.seen, index / p.heads);
      row_limits[r] = {range.x, range.y, KF_MASK ? mask_of(p, job, index) : 0};
    }
    const auto copy = [&](int n) {
      if (n < job.end) {
        const uint stage = (n - job.begin) % kStages;
        const int valid = job.seen.limit - n * kKeys;
        copy_tile<kKeys, kHeadWords, kHeadBytes>(
            k + stage * kKeyTile,
            p.k + job.batch * p.k_batch + job.kv_head * p.k_head + n * kKeys * p.k_key, p.k_key,
            valid);
        copy_tile<kKeys, kValueWords, kValueBytes>(
            v + stage * kValueTile,
            p.v + job.batch * p.v_batch + job.kv_head * p.v_head + n * kKeys * p.v_key, p.v_key,
            valid);
      }
      copies_commit();
    };
    const auto state_of = [&](int b, uint64(&state)[2], bool(&inside)[2]) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint index = job.first + row + 16 * b + 8 * r;
        inside[r] = index < p.index_end;
        state[r] = uint64(job.group - p.block_group) * p.block_indices +
                   (inside[r] ? index : p.index_end - 1);
      }
    };

    Marks<kValues / 2> marks[kBlocks];
    for (int pass = kPasses - 1; pass >= 0; --pass) {  // what V has of Inf and NaN, then the rest
      if (pass != kPasses - 1) __syncthreads();
#pragma unroll
      for (int n = 0; n < kAhead; ++n) copy(job.begin + n);
      Sums sums[kBlocks];
      Values o;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint64 state[2];
        bool inside[2], begun[2];
        state_of(b, state, inside);
#pragma unroll
        for (int r = 0; r < 2; ++r) begun[r] = load_sums(sums[b], r, p, state[r]) && pass == 0;
        load_values<Layout>(o[b], marks[b], p, state, begun, column, lane);
      }

      uint stage = 0;
#pragma unroll 1
      for (int n = job.begin; n < job.end; ++n) {
        if constexpr (kAhead > 0) {
          copies_wait<kAhead - 1>();
          __syncthreads();  // tile n is there, and the one before done with
          copy(n + kAhead);
        } else {
          __syncthreads();
          copy(n);
          copies_wait<0>();
          __syncthreads();
        }
#if KF_CAREFUL
        transform_values<kThreads>(v + stage * kValueTile, kValueTile, pass, threadIdx.x);
        __syncthreads();
#endif
        Scores s;
        compute_scores(s, my_q, my_k + stage * kKeyTile);
        if (n > job.begin && n * kKeys % KF_SPLIT_LEN == 0) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) close_split(sums[b]);
        }
        if (unfinished<kKeys>(job, n)) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            const RowLimits x = row_limits[row + 16 * b], y = row_limits[row + 16 * b + 8];
            const Limits limits = {{{x.begin, x.end}, {y.begin, y.end}}, {x.mask, y.mask}};
            finish_scores(s[b], limits, p, n, lane);
          }
        }
        float alpha[kBlocks][2];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          softmax(s[b], sums[b], p, alpha[b]);
          if (KF_CAREFUL && pass != 0) alpha[b][0] = alpha[b][1] = 1;
        }
        add_values(o, s, alpha, my_v + stage * kValueTile, pass);
        if (++stage == kStages) stage = 0;
      }
      copies_wait<0>();
#if KF_CAREFUL
      if (pass != 0) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) mark_values(o[b], marks[b], pass);
        continue;
      }
      __syncthreads();  // all have read the state
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) apply_marks(o[b], marks[b]);
      const bool write = true;
#else
      bool finite = true;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) finite &= all_finite(o[b]);
      const bool write = !__syncthreads_or(!finite);
      if (threadIdx.x == 0) *redo_of<kRows, 1>(p, tiles, job) = !write;
#endif
      if (!write) continue;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        close_split(sums[b]);
        uint64 state[2];
        bool inside[2];
        state_of(b, state, inside);
        store_values<Layout>(o[b], p, state, inside, column, lane);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (inside[r] && lane % 4 == 0 && column == 0) store_sums(sums[b], r, p, state[r]);
        }
      }
    }
  }
}

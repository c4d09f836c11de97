// Prefill from compute capability 8.0 on: each warp folds tiles of keys into its rows by mma.sync,
// while cp.async brings the next tile; after FlashAttention-2 (Dao, 2023).
//
// float32 products are three products of tf32: with a = a_high + a_low, a b = a_high b_high +
// a_high b_low + a_low b_high + what is below float32's last bit (Markidis et al., 2018). Matrix
// units round sums toward zero, which adds up to a bias over many keys: so they sum 16 terms at
// most, the small ones first, and the rest is added by rounding to nearest (Ootomo and Yokota,
// 2022).
#include "fold.cuh"
#include "mma.cuh"

KEYFOLD_INLINE constexpr i32 round_up(i32 x, i32 to) { return (x + to - 1) / to * to; }

constexpr i32 kStages = KEYFOLD_STAGES, kAhead = kStages - 1;
constexpr i32 kBlocks = KEYFOLD_BLOCKS;  // of 16 rows, of a warp
constexpr i32 kRowWarps = KEYFOLD_ROW_WARPS;
// Each has a part of V's columns, and of the sums of products that are scores.
constexpr i32 kColumnWarps = KEYFOLD_COLUMN_WARPS;
constexpr i32 kWarpRows = 16 * kBlocks, kRows = kWarpRows * kRowWarps;
constexpr i32 kElement = kDType == 0 ? 4 : 2, kLine = 128 / kElement;
// Columns of a warp. A part of several begins at a line's begin.
KEYFOLD_INLINE constexpr i32 part_of(i32 dim, i32 unit) {
  return round_up((dim + kColumnWarps - 1) / kColumnWarps, kColumnWarps > 1 ? kLine : unit);
}
constexpr i32 kHeadWidth = part_of(kHeadDim, 16);
constexpr i32 kValueWidth = part_of(kValueDim, kDType == 0 ? 32 : 16);
// Rows of tiles in shared memory: whole lines of 128 bytes; the 16-byte word w of row r lies at
// w ^ (r % 8). Words behind a row's end stay zero.
constexpr u32 kHeadBytes = round_up(kHeadWidth * kColumnWarps, kLine) * kElement;
constexpr u32 kValueBytes = round_up(kValueWidth * kColumnWarps, kLine) * kElement;
constexpr u32 kQueryTile = kRows * kHeadBytes;
constexpr u32 kKeyTile = kKeys * kHeadBytes, kValueTile = kKeys * kValueBytes;
// Behind q, the stages of K and of V: parts of scores; what rows see, as few tiles ask for it.
constexpr u32 kPartBytes = kColumnWarps == 1 ? 0 : kWarpRows * kKeys * 4;  // of a warp
constexpr u32 kPartsAt = kQueryTile + kStages * (kKeyTile + kValueTile);
constexpr u32 kSeenAt = kPartsAt + kRowWarps * kColumnWarps * kPartBytes;
constexpr u32 kMasksAt = kSeenAt + kRows * 8;
constexpr u32 kSharedBytes = kMasksAt + (kMaskType == 0 ? 0 : kRows * 8);
static_assert(kThreads == 32 * kRowWarps * kColumnWarps && kSharedBytes == KEYFOLD_SHARED &&
                  kKeys % 16 == 0,
              "as in kernel_shape.hpp");

KEYFOLD_INLINE u32 word_at(u32 row, u32 word, u32 pitch) {
  return row * pitch + ((word ^ (row % 8)) << 4);
}

// Copies kCount rows of kWords words, of which `valid` are there.
template <i32 kCount, i32 kWords, u32 kPitch>
KEYFOLD_INLINE void copy_tile(u32 to, u64 from, i64 step, i32 valid) {
  if constexpr (kThreads % kWords == 0) {
    constexpr i32 kAtOnce = i32(kThreads) / kWords;
    const i32 row = i32(threadIdx.x) / kWords, word = i32(threadIdx.x) % kWords;
    u64 at = from + row * step + 16 * word;
#pragma unroll
    for (i32 i = 0; i < kCount; i += kAtOnce, at += kAtOnce * step) {
      if (kCount % kAtOnce != 0 && row + i >= kCount) break;
      copy_16(to + word_at(row + i, word, kPitch), at, row + i < valid);
    }
  } else {
#pragma unroll 4
    for (i32 i = i32(threadIdx.x); i < kCount * kWords; i += i32(kThreads)) {
      const i32 row = i / kWords, word = i % kWords;
      copy_16(to + word_at(row, word, kPitch), from + row * step + 16 * word, row < valid);
    }
  }
}

// Where a lane reads the four matrices of 16 rows and two words of a tile: rows first (Q; V
// transposed), or words first (K). `step` moves on by two words.
KEYFOLD_INLINE u32 rows_first(u32 tile, u32 pitch, u32 lane) {
  return tile + word_at(lane % 16, lane / 16, pitch);
}
KEYFOLD_INLINE u32 words_first(u32 tile, u32 pitch, u32 lane) {
  return tile + word_at(lane / 16 * 8 + lane % 8, lane / 8 % 2, pitch);
}
KEYFOLD_INLINE u32 step(u32 address, i32 i) { return (address ^ (32 * (i % 4))) + 128 * (i / 4); }

using Scores = float[kBlocks][kKeys / 2];
using Values = float[kBlocks][kValueWidth / 2];
using Alphas = float[kBlocks][2];

// --- Products of 16-bit elements ----------------------------------------------------------------

struct Half {
  using Layout = Pairs;
  static KEYFOLD_INLINE u32 first_value(u32 v, u32 lane) {
    return rows_first(v, kValueBytes, lane);
  }

  // s = q k^T.
  static KEYFOLD_INLINE void compute_scores(Scores& s, u32 q, u32 k) {
#pragma unroll
    for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (i32 i = 0; i < kKeys / 2; ++i) s[b][i] = 0.0f;
    }
#pragma unroll
    for (i32 i = 0; i < kHeadWidth / 16; ++i) {
      u32 left[kBlocks][4];
#pragma unroll
      for (i32 b = 0; b < kBlocks; ++b) load_matrices(left[b], step(q, i) + b * 16 * kHeadBytes);
#pragma unroll
      for (i32 j = 0; j < kKeys / 16; ++j) {
        u32 right[4];
        load_matrices(right, step(k, i) + j * 16 * kHeadBytes);
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) {
          multiply(s[b] + 8 * j, left[b], right[0], right[1]);
          multiply(s[b] + 8 * j + 4, left[b], right[2], right[3]);
        }
      }
    }
  }

  // o = alpha o + weights v.
  static KEYFOLD_INLINE void add_values(Values& o, const Scores& s, const Alphas& alpha, u32 v,
                                        i32 pass) {
    u32 w[kBlocks][kKeys / 4];
#pragma unroll
    for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (i32 i = 0; i < kKeys / 4; ++i) {
        w[b][i] = pack(seen_in(pass, s[b][2 * i]), seen_in(pass, s[b][2 * i + 1]));
      }
      if (!__any_sync(~0u, alpha[b][0] != 1.0f || alpha[b][1] != 1.0f)) continue;  // as often
#pragma unroll
      for (i32 i = 0; i < kValueWidth / 2; ++i) {
        const float a = alpha[b][i / 2 % 2];
        o[b][i] = vanished(a) ? 0.0f : o[b][i] * a;
      }
    }
#pragma unroll
    for (i32 i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (i32 j = 0; j < kValueWidth / 16; ++j) {
        u32 right[4];
        load_transposed(right, step(v, j) + i * 16 * kValueBytes);
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) {
          const u32 left[4] = {w[b][4 * i], w[b][4 * i + 1], w[b][4 * i + 2], w[b][4 * i + 3]};
          multiply(o[b] + 8 * j, left, right[0], right[1]);
          multiply(o[b] + 8 * j + 4, left, right[2], right[3]);
        }
      }
    }
  }
};

// --- Products of float32 ------------------------------------------------------------------------

// x = high + low, each of tf32's 11 bits; where x is Inf, careful kernels take it for Inf + 0.
KEYFOLD_INLINE bool is_infinite(u32 x) { return (x & 0x7fffffffu) == 0x7f800000u; }
KEYFOLD_INLINE u32 rest_of(u32 x, u32 high) {
  if (kCareful && is_infinite(x)) return 0;
  return __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}
// To the nearest: low has either sign, so that the product of two lows, which is left out, has no
// bias.
KEYFOLD_INLINE void split_nearest(u32 x, u32& high, u32& low) {
  high = (x + 0x1000u) & 0xffffe000u;
  if (kCareful && is_infinite(high)) high = x & 0xffffe000u;  // the largest stay finite
  low = rest_of(x, high);
}
// Cheaper, for the side that every warp has to split again.
KEYFOLD_INLINE void split_down(u32 x, u32& high, u32& low) {
  high = x & 0xffffe000u;
  low = rest_of(x, high);
}
// Of a high part, what meets a low one: Inf has met the other's high part.
KEYFOLD_INLINE u32 finite_high(u32 high) { return kCareful && is_infinite(high) ? 0 : high; }

struct Single {
  using Layout = Quads;
  static KEYFOLD_INLINE u32 first_value(u32 v, u32) { return v; }

  struct Split {
    u32 high[4], low[4];
  };
  // d = a b over 16 terms: two products of 8 for each block and each n of kN.
  template <i32 kN>
  static KEYFOLD_INLINE void multiply(float (&d)[kBlocks][kN][4], const Split (&a)[kBlocks][2],
                                      const u32 (&b)[2][kN][2]) {
    u32 high[2][kN][2], low[2][kN][2];
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
#pragma unroll
      for (i32 n = 0; n < kN; ++n) {
#pragma unroll
        for (i32 e = 0; e < 2; ++e) split_down(b[i][n][e], high[i][n][e], low[i][n][e]);
      }
    }
#pragma unroll
    for (i32 term = 0; term < 6; ++term) {
      const i32 i = term % 2, kind = term / 2;  // high x low, low x high, high x high
#pragma unroll
      for (i32 m = 0; m < kBlocks; ++m) {
        u32 left[4];
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          const u32 x = a[m][i].high[e];
          left[e] = kind == 0 ? finite_high(x) : kind == 1 ? a[m][i].low[e] : x;
        }
#pragma unroll
        for (i32 n = 0; n < kN; ++n) {
          u32 right[2];
#pragma unroll
          for (i32 e = 0; e < 2; ++e) {
            const u32 x = high[i][n][e];
            right[e] = kind == 0 ? low[i][n][e] : kind == 1 ? finite_high(x) : x;
          }
          multiply_tf32(d[m][n], left, right[0], right[1], term > 0);
        }
      }
    }
  }

  static KEYFOLD_INLINE void compute_scores(Scores& s, u32 q, u32 k) {
    constexpr i32 kN = kKeys % 32 == 0 ? 4 : 2;
#pragma unroll
    for (i32 i = 0; i < kHeadWidth / 8; i += 2) {
      Split left[kBlocks][2];
#pragma unroll
      for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (i32 h = 0; h < 2; ++h) {
          u32 x[4];
          load_matrices(x, step(q, i + h) + b * 16 * kHeadBytes);
#pragma unroll
          for (i32 e = 0; e < 4; ++e) split_nearest(x[e], left[b][h].high[e], left[b][h].low[e]);
        }
      }
#pragma unroll
      for (i32 j = 0; j < kKeys / 8; j += kN) {
        u32 right[2][kN][2];
#pragma unroll
        for (i32 h = 0; h < 2; ++h) {
#pragma unroll
          for (i32 n = 0; n < kN; n += 2) {
            u32 x[4];
            load_matrices(x, step(k, i + h) + (j + n) * 8 * kHeadBytes);
#pragma unroll
            for (i32 e = 0; e < 4; ++e) right[h][n + e / 2][e % 2] = x[e];
          }
        }
        float part[kBlocks][kN][4];
        multiply(part, left, right);
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (i32 e = 0; e < 4 * kN; ++e) {
            float& at = s[b][4 * j + e];
            at = i == 0 ? part[b][e / 4][e % 4] : at + part[b][e / 4][e % 4];
          }
        }
      }
    }
  }

  // Key 2t of eight is a product's k = t, key 2t + 1 its k = t + 4: so weights stay where they are.
  // Columns 4g to 4g + 3 of 32 are n = g of four products: so V is read by 16 bytes.
  static KEYFOLD_INLINE void add_values(Values& o, const Scores& s, const Alphas& alpha, u32 v,
                                        i32 pass) {
    const u32 t = threadIdx.x % 4, g = threadIdx.x / 4 % 8;
    const u32 even = v + word_at(2 * t, g, kValueBytes);
    const u32 odd = v + word_at(2 * t + 1, g, kValueBytes);
#pragma unroll
    for (i32 i = 0; i < kKeys / 8; i += 2) {
      Split left[kBlocks][2];
#pragma unroll
      for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (i32 h = 0; h < 2; ++h) {
#pragma unroll
          for (i32 e = 0; e < 4; ++e) {
            const float x = seen_in(pass, s[b][4 * (i + h) + (e % 2 * 2 + e / 2)]);
            split_nearest(__float_as_uint(x), left[b][h].high[e], left[b][h].low[e]);
          }
        }
      }
#pragma unroll
      for (i32 j = 0; j < kValueWidth / 32; ++j) {
        u32 right[2][4][2];
#pragma unroll
        for (i32 h = 0; h < 2; ++h) {
          u32 x[4], y[4];
          load_shared(x, even + (i + h) * 8 * kValueBytes + 128 * j);
          load_shared(y, odd + (i + h) * 8 * kValueBytes + 128 * j);
#pragma unroll
          for (i32 n = 0; n < 4; ++n) right[h][n][0] = x[n], right[h][n][1] = y[n];
        }
        float part[kBlocks][4][4];
        multiply(part, left, right);
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (i32 e = 0; e < 16; ++e) {
            float& at = o[b][16 * j + e];
            const float x = part[b][e / 4][e % 4], a = alpha[b][e / 2 % 2];
            at = i > 0 ? at + x : vanished(a) ? x : fmaf(at, a, x);
          }
        }
      }
    }
  }
};

// Adds up the parts of the column warps, in their order: so all of them have the same scores.
// `parts` are those of the warp's rows.
KEYFOLD_INLINE void add_parts(Scores& s, u32 parts, u32 part, u32 rows, u32 lane) {
  if constexpr (kColumnWarps == 1) return;
  const auto place = [&](u32 from, i32 b, i32 i) {
    return parts + from * kPartBytes + u32(b * kKeys / 8 + i) * 512 + lane * 16;
  };
#pragma unroll
  for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (i32 i = 0; i < kKeys / 8; ++i) store_shared(place(part, b, i), s[b] + 4 * i);
  }
  named_sync(1 + rows, 32 * kColumnWarps);
#pragma unroll
  for (i32 b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (i32 i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (i32 from = 0; from < kColumnWarps; ++from) {
        u32 x[4];
        load_shared(x, place(from, b, i));
#pragma unroll
        for (i32 e = 0; e < 4; ++e) {
          float& at = s[b][4 * i + e];
          at = from == 0 ? __uint_as_float(x[e]) : at + __uint_as_float(x[e]);
        }
      }
    }
  }
}

// --- The kernel ---------------------------------------------------------------------------------

template <bool kFirst, class First, class Second>
struct Conditional {
  using Type = First;
};
template <class First, class Second>
struct Conditional<false, First, Second> {
  using Type = Second;
};
using Products = Conditional<kDType == 0, Single, Half>::Type;

extern "C" __global__ void __launch_bounds__(kThreads, KEYFOLD_RESIDENT)
    mma(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  extern __shared__ __align__(128) unsigned char shared[];
  Range* const seen = reinterpret_cast<Range*>(shared + kSeenAt);
  u64* const masks = reinterpret_cast<u64*>(shared + kMasksAt);
  const u32 q = shared_address(shared), k = q + kQueryTile, v = k + kStages * kKeyTile;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 row_warp = warp % kRowWarps, part = warp / kRowWarps;
  const u32 row = row_warp * kWarpRows + lane / 4;  // of the tile; and row + 8, + 16, ...
  const u32 column = part * kValueWidth;            // the first of the warp
  const u32 head = part * kHeadWidth * kElement,
            parts = q + kPartsAt + row_warp * kColumnWarps * kPartBytes;
  const u32 my_q = rows_first(q + row_warp * kWarpRows * kHeadBytes, kHeadBytes, lane) + head;
  const u32 my_k = words_first(k, kHeadBytes, lane) + head;
  const u32 my_v = Products::first_value(v, lane) + column * kElement;

  for (u32 i = threadIdx.x; i < kSeenAt / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  }
  Job job;
  for (u32 i = 0; job_of<kRows>(p, jobs, i, job); ++i) {
    if (job.skip) continue;
    __syncthreads();  // shared memory is free
    copy_tile<kRows, kHeadWords, kHeadBytes>(
        q, p.q + state_index(p, job.group, job.first) * (kHeadDim * kElement), kHeadDim * kElement,
        i32(p.index_end - job.first));
    for (u32 r = threadIdx.x; r < kRows; r += kThreads) {
      const u32 index = smaller(job.first + r, p.index_end - 1);
      seen[r] = visible(job.seen, index / p.heads);
      if (kMaskType != 0) masks[r] = mask_address(p, job.batch, job.group, index);
    }
    const auto copy = [&](i32 n) {
      if (n < job.end) {
        const u32 stage = u32(n - job.begin) % kStages;
        const i32 valid = job.seen.limit - n * kKeys;
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

    Marks<kValueWidth / 2> marks[kBlocks];
    for (i32 pass = kPasses - 1; pass >= 0; --pass) {
      if (pass != kPasses - 1) __syncthreads();
#pragma unroll
      for (i32 n = 0; n < kAhead; ++n) copy(job.begin + n);
      Sums sums[kBlocks];
      Values o;
#pragma unroll
      for (i32 b = 0; b < kBlocks; ++b) {
        const Places at = places_of(p, job, row + 16 * b);
        load_sums(sums[b], p, at);
        load_values<Products::Layout>(o[b], sums[b], p, at, column, lane);
        if (pass == 0) continue;
#pragma unroll
        for (float& x : o[b]) x = 0.0f;
      }

      u32 stage = 0;
#pragma unroll 1
      for (i32 n = job.begin; n < job.end; ++n) {
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
        if constexpr (kCareful) {
          u32* const words = reinterpret_cast<u32*>(shared + (v - q) + stage * kValueTile);
          for (u32 w = threadIdx.x; w < kValueTile / 4; w += kThreads) {
            words[w] = value_for(pass, words[w]);
          }
          __syncthreads();
        }
        Scores s;
        Products::compute_scores(s, my_q, my_k + stage * kKeyTile);
        add_parts(s, parts, part, row_warp, lane);
        if (n > job.begin && n * kKeys % i32(kSplitLen) == 0) {
#pragma unroll
          for (i32 b = 0; b < kBlocks; ++b) close_split(sums[b]);
        }
        const bool edge = n * kKeys < job.full.begin || (n + 1) * kKeys > job.full.end;
        if (kFinished || edge) {
#pragma unroll
          for (i32 b = 0; b < kBlocks; ++b) {
            const u32 r = row + 16 * b;
            const u64 rows[2] = {kMaskType == 0 ? 0 : masks[r], kMaskType == 0 ? 0 : masks[r + 8]};
            finish_scores(s[b], p, rows, n * kKeys + 2 * i32(lane % 4), edge, p.softcap,
                          [&](u32 of) { return seen[r + 8 * of]; });
          }
        }
        Alphas alpha;
        softmax(s, sums, p, alpha);
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) {
          for (float& x : alpha[b]) x = seen_in(pass, x);
        }
        Products::add_values(o, s, alpha, my_v + stage * kValueTile, pass);
        if (++stage == kStages) stage = 0;
      }
      copies_wait<0>();

      if constexpr (kCareful) {
        if (pass != 0) {
#pragma unroll
          for (i32 b = 0; b < kBlocks; ++b) mark_values(o[b], marks[b], pass);
          continue;
        }
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) apply_marks(o[b], marks[b]);
      } else {
        bool finite = true;
#pragma unroll
        for (i32 b = 0; b < kBlocks; ++b) finite = finite && all_finite(o[b]);
        const bool redo = __syncthreads_or(finite ? 0 : 1) != 0;
        if (threadIdx.x == 0) write_word(job.redo, redo ? 1 : 0);
        if (redo) continue;
      }
#pragma unroll
      for (i32 b = 0; b < kBlocks; ++b) {
        close_split(sums[b]);
        const Places at = places_of(p, job, row + 16 * b);
        store_values<Products::Layout>(o[b], p, at, column, lane);
        if (lane % 4 == 0 && column == 0) store_sums(sums[b], p, at);
      }
    }
  }
}

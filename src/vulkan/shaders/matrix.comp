#version 460
#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_KHR_shader_subgroup_vote : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
// Prefill on cooperative matrices of subgroup scope (VK_KHR_cooperative_matrix), for float16 and
// bfloat16. A subgroup owns kBlocks blocks of kM rows of the tile and meets all keys; tiles of K
// and V are shared by the workgroup, and what a subgroup loads of them serves all its blocks. A
// split is reduced from the empty state, tile of keys after tile of keys, counted from the split's
// begin, as in attend.comp.
//
// Softmax works on the accumulators' elements where they are: matrices of one type have one layout,
// so a row's maximum, spread over a matrix of that type, meets the row's scores element by element.
// With NV_MATRIX2 (VK_NV_cooperative_matrix2: reductions, conversions) all of it stays in
// registers. Without, maxima and weights go through shared memory.
#ifdef NV_MATRIX2
#extension GL_NV_cooperative_matrix2 : require
#endif
#ifdef BFLOAT16
#extension GL_EXT_bfloat16 : require
#define ELEMENT bfloat16_t
#else
#define ELEMENT float16_t
#endif
#include "common.glsl"

layout(constant_id = 16) const uint kSubgroups = 4;
layout(constant_id = 17) const uint kKeys = 64;  // of a tile; a multiple of kN and kK
layout(constant_id = 18) const uint kM = 8;      // one product is kM x kN x kK
layout(constant_id = 19) const uint kN = 8;
#ifdef NV_MATRIX2
#define kK kN
#else
layout(constant_id = 20) const uint kK = 8;
#endif
layout(constant_id = 21) const bool kPartial = false;
// Whether a score is finished before the maximum is taken; else its scale is left to the exp2.
layout(constant_id = 22) const bool kFinished = false;
layout(constant_id = 23) const uint kBlocks = 1;  // of kM rows, a subgroup's
// Registers or shared memory: the first kHeld steps of q stay in registers, the others in shared
// memory; with kShared, V takes K's place there, at two more barriers a tile.
layout(constant_id = 24) const uint kHeld = 128;
layout(constant_id = 25) const bool kShared = false;

const uint kOwnRows = kM * kBlocks, kRows = kOwnRows * kSubgroups;
const uint kThreads = gl_WorkGroupSize.x;
const uint kLine = kN / 4;  // 16-byte words of a matrix's row of floats
const uint kKeyTiles = kKeys / kN, kKeySteps = kKeys / kK;
const uint kHeadSteps = (kHeadDim + kK - 1) / kK;
const uint kValueTiles = (kValueDim + kN - 1) / kN;
const uint kHeldSteps = kHeld < kHeadSteps ? kHeld : kHeadSteps;
// Words of a row in shared memory: whole matrices, and one more to spread rows over the banks.
const uint kHeadWide = kHeadSteps * kK / 8, kHeadLine = kHeadWide + 1;
const uint kValueWide = kValueTiles * kN / 8, kValueLine = kValueWide + 1;
const uint kHeldWide = kHeldSteps * kK / 8;
const uint kAsideWide = kHeadWide - kHeldWide, kAsideLine = kAsideWide + 1;
const uint kMarksLine = (kValueDim + 63) / 64;  // see odd_values.glsl
// K, then V; in their place at first q on its way to registers, at last the marks. Then q.
const uint kKeysEnd = kKeys * kHeadLine, kValuesAt = kShared ? 0 : kKeysEnd;
const uint kValuesEnd = kValuesAt + kKeys * kValueLine;
const uint kTileWords = kValuesEnd > kKeysEnd ? kValuesEnd : kKeysEnd;
const uint kMarksEnd = kRows * kMarksLine;
const uint kAsideAt = kTileWords > kMarksEnd ? kTileWords : kMarksEnd;
const uint kWords = kAsideAt + (kHeldSteps < kHeadSteps ? kRows * kAsideLine : 0);
const uint kQueryRows = kTileWords / kHeadLine / kM * kM;  // that fit into K's and V's place
// Up to eight threads side by side load a row, each every eighth word; then the rows kStep on.
const uint kHeadLanes = kHeadWide % 8 == 0 ? 8 : kHeadWide & (~kHeadWide + 1);
const uint kHeadParts = kHeadWide / kHeadLanes, kHeadStep = kThreads / kHeadLanes;
const uint kHeadRounds = (kKeys + kHeadStep - 1) / kHeadStep;
const uint kValueLanes = kValueWide % 8 == 0 ? 8 : kValueWide & (~kValueWide + 1);
const uint kValueParts = kValueWide / kValueLanes, kValueStep = kThreads / kValueLanes;
const uint kValueRounds = (kKeys + kValueStep - 1) / kValueStep;
const uint kHeadLoads = kHeadRounds * kHeadParts, kValueLoads = kValueRounds * kValueParts;

// Weights are taken times 2^kWeightBits, so that float16 holds those down to 2^-39, and that no
// output of bfloat16 overflows within a split, where a change of 0 would make it NaN.
#ifdef BFLOAT16
const float kWeightBits = -12.0, kWeightUnit = 4096.0;
#else
const float kWeightBits = 15.0, kWeightUnit = 1.0 / 32768.0;
#endif
const float kLog2e = 1.44269504;
const float kLowest = -3.402823466e38;  // the maximum of no scores: hidden ones are below it

#define MATRIX(type, rows, columns, use) coopmat<type, gl_ScopeSubgroup, rows, columns, use>
#define SCORES MATRIX(float, kM, kN, gl_MatrixUseAccumulator)
#define LEFT MATRIX(ELEMENT, kM, kK, gl_MatrixUseA)
#define RIGHT MATRIX(ELEMENT, kK, kN, gl_MatrixUseB)

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Float { float value; };

// Matrices have to lie at multiples of 16 bytes. That takes elements as large: an array of floats
// may begin at any multiple of 4, from where NVIDIA's driver loads a matrix wrongly.
shared uvec4 s_words[kWords];
shared vec4 s_places[kM * kLine];  // of each element of a matrix: 1024 * row + column
shared ivec2 s_range[kRows];       // keys that each row sees
shared uint64_t s_mask[kMaskType == 0 ? 1 : kRows];
shared vec2 s_ml[kRows];  // at a split's end: (m, l), then the factors of the merge
#ifndef NV_MATRIX2
shared vec4 s_scratch[kSubgroups * kM * kLine];
shared uvec4 s_weights[kRows * kKeys / 8];
#endif

uint t_id, t_row;       // t_row: of the tile, the subgroup's first
uint t_group, t_first;  // absolute group; index of the tile's first row
// On their way to shared memory: the keys during softmax, the values during the first product.
uvec4 t_words[kHeadLoads > kValueLoads ? kHeadLoads : kValueLoads];

// The score of a row of the tile and a key that may be hidden from it: whatever its product is.
float finish_score(float product, uint row, int key) {
  const ivec2 range = s_range[row];
  if (key < range.x || key >= range.y) return hidden();
  if (!kFinished) return product;
  return score(product, kMaskType == 0 ? 0 : s_mask[row] + int64_t(key) * params.mask_key);
}

#include "odd_values.glsl"

// `from` is of the tile's first key, `pitch` from key to key, `last` the last key that there is. It
// also stands for the keys behind it: their weights are 0, whatever stands there.
void load_keys(uint64_t from, int64_t pitch, int last) {
  const uint first = t_id / kHeadLanes, lane = t_id % kHeadLanes;
  if (kKeys % kHeadStep != 0) last = min(last, int(kKeys) - 1);
  [[unroll]] for (uint round = 0; round < kHeadRounds; ++round) {
    const int row = min(int(first + round * kHeadStep), last);
    const uint64_t at = from + int64_t(row) * pitch + 16 * lane;
    [[unroll]] for (uint part = 0; part < kHeadParts; ++part) {
      const uint w = lane + part * kHeadLanes, i = round * kHeadParts + part;
      t_words[i] = uvec4(0);
      if (kHeadWords < kHeadWide && w >= kHeadWords) continue;
      t_words[i] = load_words(at + 16 * kHeadLanes * part);
    }
  }
}

void store_keys() {
  [[unroll]] for (uint round = 0; round < kHeadRounds; ++round) {
    const uint row = t_id / kHeadLanes + round * kHeadStep;
    if (kKeys % kHeadStep != 0 && row >= kKeys) continue;
    [[unroll]] for (uint part = 0; part < kHeadParts; ++part) {
      s_words[row * kHeadLine + t_id % kHeadLanes + part * kHeadLanes] =
          t_words[round * kHeadParts + part];
    }
  }
}

void load_values(uint64_t from, int64_t pitch, int last) {
  const uint first = t_id / kValueLanes, lane = t_id % kValueLanes;
  if (kKeys % kValueStep != 0) last = min(last, int(kKeys) - 1);
  [[unroll]] for (uint round = 0; round < kValueRounds; ++round) {
    const int row = min(int(first + round * kValueStep), last);
    const uint64_t at = from + int64_t(row) * pitch + 16 * lane;
    [[unroll]] for (uint part = 0; part < kValueParts; ++part) {
      const uint w = lane + part * kValueLanes, i = round * kValueParts + part;
      t_words[i] = uvec4(0);
      if (kValueWords < kValueWide && w >= kValueWords) continue;
      t_words[i] = load_words(at + 16 * kValueLanes * part);
    }
  }
}

void store_values() {
  uvec4 odd = uvec4(0);
  [[unroll]] for (uint round = 0; round < kValueRounds; ++round) {
    const uint row = t_id / kValueLanes + round * kValueStep;
    if (kKeys % kValueStep != 0 && row >= kKeys) continue;
    [[unroll]] for (uint part = 0; part < kValueParts; ++part) {
      const uvec4 word = t_words[round * kValueParts + part];
      odd |= odd_signs(word);
      s_words[kValuesAt + row * kValueLine + t_id % kValueLanes + part * kValueLanes] = word;
    }
  }
  if (odd == uvec4(0)) return;
  t_odd = true;  // it is rare: so the words are stored again, with 0 for Inf and NaN
  for (uint i = 0; i < kValueLoads; ++i) {
    const uint row = t_id / kValueLanes + i / kValueParts * kValueStep;
    const uint w = t_id % kValueLanes + i % kValueParts * kValueLanes;
    if (row < kKeys) {
      const uint at = kValuesAt + row * kValueLine + w;
      s_words[at] = without_odd(s_words[at]);
    }
  }
}

// A word of q; 0 behind its rows and columns.
uvec4 query_word(uint row, uint w) {
  const uint index = t_first + row;
  if (w >= kHeadWords || row >= kRows || index >= params.index_end) return uvec4(0);
  return load_words(params.q + (state_index(t_group, index) * kHeadWords + w) * 16);
}

// kQueryRows rows of q, from row `first` of the tile on, on their way to registers.
void store_queries(uint first) {
  for (uint i = t_id; i < kQueryRows * kHeldWide; i += kThreads) {
    const uint row = i / kHeldWide, w = i % kHeldWide;
    s_words[row * kHeadLine + w] = query_word(first + row, w);
  }
}

// What stays in shared memory of q.
void store_aside() {
  for (uint i = t_id; i < kRows * kAsideWide; i += kThreads) {
    const uint row = i / kAsideWide, w = i % kAsideWide;
    s_words[kAsideAt + row * kAsideLine + w] = query_word(row, kHeldWide + w);
  }
}

// What one subgroup wrote to shared memory is seen by all of it.
void sync() {
  subgroupMemoryBarrierShared();
  subgroupBarrier();
}

SCORES places() {
  SCORES place;
  coopMatLoad(place, s_places, 0, kLine, gl_CooperativeMatrixLayoutRowMajor);
  return place;
}
uint row_of(uint block, float place) { return t_row + block * kM + uint(place) / 1024; }
uint column_of(float place) { return uint(place) % 1024; }

float larger(const in float a, const in float b) { return max(a, b); }
float total(const in float a, const in float b) { return a + b; }

// Each row's maximum or sum, in all its columns.
SCORES reduce_rows(SCORES x, bool sum) {
#ifdef NV_MATRIX2
  if (sum) {
    coopMatReduceNV(x, x, gl_CooperativeMatrixReduceRowNV, total);
  } else {
    coopMatReduceNV(x, x, gl_CooperativeMatrixReduceRowNV, larger);
  }
#else
  const uint begin = gl_SubgroupID * kM * kLine;
  sync();
  coopMatStore(x, s_scratch, begin, kLine, gl_CooperativeMatrixLayoutRowMajor);
  sync();
  for (uint row = gl_SubgroupInvocationID; row < kM; row += gl_SubgroupSize) {
    vec4 all = s_scratch[begin + row * kLine];
    for (uint i = 1; i < kLine; ++i) {
      const vec4 more = s_scratch[begin + row * kLine + i];
      all = sum ? all + more : max(all, more);
    }
    const float one =
        sum ? all.x + all.y + all.z + all.w : max(max(all.x, all.y), max(all.z, all.w));
    for (uint i = 0; i < kLine; ++i) s_scratch[begin + row * kLine + i] = vec4(one);
  }
  sync();
  coopMatLoad(x, s_scratch, begin, kLine, gl_CooperativeMatrixLayoutRowMajor);
#endif
  return x;
}

// Rounds a weight to bfloat16: a conversion may cut off what it drops, which makes all weights too
// small for their sum. The product holds 8 bits more than p, and so rounds there.
float round_weight(float p) {
  precise float rounded = fma(p, -65536.0, p * 65537.0);
  return kDType == 2 ? rounded : p;
}

#ifndef NV_MATRIX2
// Eight rounded weights.
uint weight_pair(vec2 p) {
#ifdef BFLOAT16
  const uvec2 bits = floatBitsToUint(p);
  return bits.x >> 16 | (bits.y & 0xffff0000u);
#else
  return packFloat2x16(f16vec2(p));
#endif
}
uvec4 weight_word(vec4 a, vec4 b) {
  return uvec4(weight_pair(a.xy), weight_pair(a.zw), weight_pair(b.xy), weight_pair(b.zw));
}
#endif

// Merges a row's (m, l) of a split into its state, or writes that of its partial state, and leaves
// the factors of the two outputs.
void merge_row(uint row, uint split) {
  const uint index = t_first + row;
  vec2 part = s_ml[row];
  if (is_nan(part.y)) part.x = nan();  // and stays
  s_ml[row] = vec2(1.0, 0.0);
  if (index >= params.index_end) return;
  if (kPartial) {
    const uint64_t at = partial_index(gl_WorkGroupID.z, split - params.split, index);
    Vec2(params.partial_ml + 8 * at).value = part.y != 0.0 ? part : vec2(hidden(), -1.0);
  } else if (part.y != 0.0) {
    Vec2 state = Vec2(params.ml + 8 * state_index(t_group, index));
    vec2 both = state.value;
    s_ml[row] = merge_factors(both, part);
    state.value = both;
  }
}

void write_element(uint row, uint column, uint split, float o) {
  const uint index = t_first + row;
  if (index >= params.index_end || column >= kValueDim) return;
  o = positive_zero(vec4(o)).x;
  if (kPartial) {
    const uint64_t at = partial_index(gl_WorkGroupID.z, split - params.split, index);
    Float(params.partial_o + (at * kValueDim + column) * 4).value = o;
  } else {
    Float to = Float(params.o + (state_index(t_group, index) * kValueDim + column) * 4);
    to.value = merge_values(vec4(to.value), vec4(o), s_ml[row]).x;
  }
}

void main() {
  t_id = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
  t_row = gl_SubgroupID * kOwnRows;
  t_group = params.group + gl_WorkGroupID.z;
  // The last rows see the most keys when a call is causal: they begin first.
  t_first = params.index_begin + (gl_NumWorkGroups.x - 1 - gl_WorkGroupID.x) * kRows;
  const uint batch_index = t_group / params.kv_heads, kv_head = t_group % params.kv_heads;
  const Batch batch = Batches(params.batches).at[batch_index];
  const uint64_t k =
      params.k + int64_t(batch_index) * params.k_batch + int64_t(kv_head) * params.k_head;
  const uint64_t v =
      params.v + int64_t(batch_index) * params.v_batch + int64_t(kv_head) * params.v_head;

  // Ranges never step back from row to row: the tile sees [early.x, late.y), each row at least
  // [late.x, early.y).
  const uint index_last = min(t_first + kRows, params.index_end) - 1;
  const ivec2 early = visible(batch, t_first / params.heads);
  const ivec2 late = visible(batch, index_last / params.heads);
  for (uint row = t_id; row < kRows; row += kThreads) {
    const uint index = min(t_first + row, index_last);
    s_range[row] = visible(batch, index / params.heads);
    if (kMaskType != 0) s_mask[row] = mask_address(batch_index, t_group, index);
  }
  for (uint i = t_id; i < kM * kLine; i += kThreads) {
    s_places[i] = float(1024 * (i / kLine) + i % kLine * 4) + vec4(0, 1, 2, 3);
  }
  if (t_id == 0) s_odd = 0;
  LEFT query[kHeldSteps == 0 ? 1 : kBlocks * kHeldSteps];
  if (kHeldSteps > 0) {
    [[dont_unroll]] for (uint first = 0; first < kRows; first += kQueryRows) {
      barrier();
      store_queries(first);
      barrier();
      [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
        const uint row = t_row + b * kM;
        if (row < first || row >= first + kQueryRows) continue;
        [[unroll]] for (uint d = 0; d < kHeldSteps; ++d) {
          coopMatLoad(query[b * kHeldSteps + d], s_words, (row - first) * kHeadLine + d * kK / 8,
                      kHeadLine, gl_CooperativeMatrixLayoutRowMajor);
        }
      }
    }
  }
  if (kHeldSteps < kHeadSteps) store_aside();

  const int64_t k_pitch = params.k_key, v_pitch = params.v_key;
  const float factor = kFinished ? kLog2e : params.scale * kLog2e;
  const uint split_first = params.split + (kPartial ? gl_WorkGroupID.y : 0);
  const uint split_last = kPartial ? split_first + 1 : params.split + params.num_splits;
  [[dont_unroll]] for (uint split = split_first; split < split_last; ++split) {
    const int split_begin = int(split * kSplitLen);
    const int begin = max(early.x, split_begin), end = min(late.y, split_begin + int(kSplitLen));
    if (!kPartial && begin >= end) continue;
    // Of a block: the output; l, each element of the columns that stood in its place; the largest
    // score yet.
    SCORES o[kBlocks * kValueTiles], l[kBlocks], m[kBlocks];
    [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
      l[b] = SCORES(0.0);
      m[b] = SCORES(kLowest);
      [[unroll]] for (uint d = 0; d < kValueTiles; ++d) o[b * kValueTiles + d] = SCORES(0.0);
    }

    int key = begin < end ? begin - (begin - split_begin) % int(kKeys) : end;
    if (key < end) load_keys(k + int64_t(key) * k_pitch, k_pitch, batch.limit - 1 - key);
    barrier();
    store_keys();
    t_odd = false;
    [[dont_unroll]] for (; key < end; key += int(kKeys)) {
      const int next = key + int(kKeys);
      barrier();  // K is there; nobody reads the last V
      load_values(v + int64_t(key) * v_pitch, v_pitch, batch.limit - 1 - key);

      SCORES s[kBlocks * kKeyTiles];
      [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) s[i] = SCORES(0.0);
      [[unroll]] for (uint d = 0; d < kHeadSteps; ++d) {
        LEFT rows[kBlocks];
        [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
          if (d < kHeldSteps) {
            rows[b] = query[b * kHeldSteps + d];
          } else {
            coopMatLoad(rows[b], s_words,
                        kAsideAt + (t_row + b * kM) * kAsideLine + (d - kHeldSteps) * kK / 8,
                        kAsideLine, gl_CooperativeMatrixLayoutRowMajor);
          }
        }
        [[unroll]] for (uint n = 0; n < kKeyTiles; ++n) {
          RIGHT keys;
          coopMatLoad(keys, s_words, n * kN * kHeadLine + d * kK / 8, kHeadLine,
                      gl_CooperativeMatrixLayoutColumnMajor);
          [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
            s[b * kKeyTiles + n] = coopMatMulAdd(rows[b], keys, s[b * kKeyTiles + n]);
          }
        }
      }
      if (kShared) barrier();  // nobody reads this K
      store_values();
      if (next < end) load_keys(k + int64_t(next) * k_pitch, k_pitch, batch.limit - 1 - next);
      if (kMaskType != 0 || key < late.x || next > early.y) {
        const SCORES place = places();
        [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
          const uint b = i / kKeyTiles, column = i % kKeyTiles * kN;
          [[unroll]] for (uint e = 0; e < place.length(); ++e) {
            s[i][e] =
                finish_score(s[i][e], row_of(b, place[e]), key + int(column + column_of(place[e])));
          }
        }
      } else if (kFinished) {
        [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
          [[unroll]] for (uint e = 0; e < s[i].length(); ++e) s[i][e] = score(s[i][e], 0);
        }
      }

      [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
        const uint first = b * kKeyTiles;
        SCORES top = s[first];
        [[unroll]] for (uint n = 1; n < kKeyTiles; ++n) {
          [[unroll]] for (uint e = 0; e < top.length(); ++e) top[e] = max(top[e], s[first + n][e]);
        }
        top = reduce_rows(top, false);
        // A change of 1 changes no bit. Without a branch: it would have o moved from register to
        // register, which takes as long.
        [[unroll]] for (uint e = 0; e < top.length(); ++e) {
          top[e] = max(m[b][e], top[e]);
          const float change = top[e] == m[b][e] ? 1.0 : exp2((m[b][e] - top[e]) * factor);
          l[b][e] *= change;
          [[unroll]] for (uint d = 0; d < kValueTiles; ++d) o[b * kValueTiles + d][e] *= change;
        }
        m[b] = top;
        [[unroll]] for (uint n = 0; n < kKeyTiles; ++n) {
          [[unroll]] for (uint e = 0; e < top.length(); ++e) {
            const float p = exp2(fma(s[first + n][e] - top[e], factor, kWeightBits));
            l[b][e] += p;
            s[first + n][e] = round_weight(p);
          }
        }
      }
      barrier();  // V is there; nobody reads this K
      if (!kShared && next < end) store_keys();

#ifndef NV_MATRIX2
      const uint scratch = gl_SubgroupID * kM * kLine;
      [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
        const uint row = t_row + i / kKeyTiles * kM, column = i % kKeyTiles * kN;
        sync();
        coopMatStore(s[i], s_scratch, scratch, kLine, gl_CooperativeMatrixLayoutRowMajor);
        sync();
        for (uint j = gl_SubgroupInvocationID; j < kM * kN / 8; j += gl_SubgroupSize) {
          const uint at = (row + 8 * j / kN) * kKeys + column + 8 * j % kN;
          s_weights[at / 8] =
              weight_word(s_scratch[scratch + 2 * j], s_scratch[scratch + 2 * j + 1]);
        }
      }
      sync();
#endif
      [[unroll]] for (uint n = 0; n < kKeySteps; ++n) {
        LEFT weights[kBlocks];
        [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
#ifdef NV_MATRIX2
          weights[b] = LEFT(s[b * kKeyTiles + n]);
#else
          coopMatLoad(weights[b], s_weights, ((t_row + b * kM) * kKeys + n * kK) / 8, kKeys / 8,
                      gl_CooperativeMatrixLayoutRowMajor);
#endif
        }
        [[unroll]] for (uint d = 0; d < kValueTiles; ++d) {
          RIGHT values;
          coopMatLoad(values, s_words, kValuesAt + n * kK * kValueLine + d * kN / 8, kValueLine,
                      gl_CooperativeMatrixLayoutRowMajor);
          [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
            const uint i = b * kValueTiles + d;
            o[i] = coopMatMulAdd(weights[b], values, o[i]);
          }
        }
      }
      if (kShared && next < end) {
        barrier();  // nobody reads this V
        store_keys();
      }
    }

    const SCORES place = places();
    [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
      l[b] = reduce_rows(l[b], true);
      [[unroll]] for (uint e = 0; e < place.length(); ++e) {
        if (column_of(place[e]) == 0) {
          const float sum = l[b][e] * kWeightUnit;
          const float scale = kFinished ? 1.0 : params.scale;
          s_ml[row_of(b, place[e])] = vec2(sum == 0.0 ? hidden() : m[b][e] * scale, sum);
        }
      }
    }
    if (t_odd) s_odd = split + 1;
    barrier();
    const bool odd = s_odd == split + 1;
    if (odd) {
      note_odd_values(k, v, k_pitch, v_pitch, begin, end);
      [[unroll]] for (uint i = 0; i < kBlocks * kValueTiles; ++i) {
        const uint b = i / kValueTiles, column = i % kValueTiles * kN;
        [[unroll]] for (uint e = 0; e < place.length(); ++e) {
          o[i][e] = marked(o[i][e], row_of(b, place[e]), column + column_of(place[e]));
        }
      }
    }
    for (uint row = gl_SubgroupInvocationID; row < kOwnRows; row += gl_SubgroupSize) {
      merge_row(t_row + row, split);
    }
    sync();
    [[unroll]] for (uint i = 0; i < kBlocks * kValueTiles; ++i) {
      const uint b = i / kValueTiles, column = i % kValueTiles * kN;
      [[unroll]] for (uint e = 0; e < place.length(); ++e) {
        write_element(row_of(b, place[e]), column + column_of(place[e]), split,
                      o[i][e] * kWeightUnit);
      }
    }
    sync();
  }
}

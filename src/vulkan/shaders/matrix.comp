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
// registers. Without, maxima and weights go through shared memory. With kPairs a lane knows which
// two rows it has a part of, and keeps their m and l once instead of four times.
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
// Where four lanes side by side are known to share two rows of an accumulator: a bit for each
// element of a lane that is of the second; else 0. See element_layout.hpp.
layout(constant_id = 26) const uint kPairs = 0;

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

LEFT t_query[kHeldSteps == 0 ? 1 : kBlocks * kHeldSteps];
SCORES t_s[kBlocks * kKeyTiles];  // scores, then weights
// Of a block: the output; l, each element of the columns that stood in its place; the largest score
// yet.
SCORES t_o[kBlocks * kValueTiles], t_l[kBlocks], t_m[kBlocks];
vec2 t_pair_l[kBlocks], t_pair_m[kBlocks];  // with kPairs, in the place of t_l and t_m

// The score of a row of the tile and a key that may be hidden from it: whatever its product is.
float finish_score(float product, uint row, int key) {
  const ivec2 range = s_range[row];
  if (key < range.x || key >= range.y) return hidden();
  if (!kFinished) return product;
  return score(product, kMaskType == 0 ? 0 : s_mask[row] + int64_t(key) * params.mask_key);
}

// In the order of their needs:
// clang-format off
#include "odd_values.glsl"
#include "matrix_tiles.glsl"
#include "matrix_softmax.glsl"
#include "matrix_products.glsl"
#include "matrix_end.glsl"
// clang-format on

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
  load_queries();

  const int64_t k_pitch = params.k_key, v_pitch = params.v_key;
  const float factor = kFinished ? kLog2e : params.scale * kLog2e;
  const uint split_first = params.split + (kPartial ? gl_WorkGroupID.y : 0);
  const uint split_last = kPartial ? split_first + 1 : params.split + params.num_splits;
  [[dont_unroll]] for (uint split = split_first; split < split_last; ++split) {
    const int split_begin = int(split * kSplitLen);
    const int begin = max(early.x, split_begin), end = min(late.y, split_begin + int(kSplitLen));
    if (!kPartial && begin >= end) continue;
    // Counted from the split's begin, so that a row's tiles are the same whatever is beside it.
    const int first_key = begin < end ? begin - (begin - split_begin) % int(kKeys) : end;
    // Once more, without Inf and NaN of V, where an output came out odd: a look at each tile of V
    // would take instructions and registers of all calls.
    bool odd = false;
    [[dont_unroll]] for (;;) {
      [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
        t_l[b] = SCORES(0.0);
        t_m[b] = SCORES(kLowest);
        t_pair_l[b] = vec2(0.0);
        t_pair_m[b] = vec2(kLowest);
        [[unroll]] for (uint d = 0; d < kValueTiles; ++d) t_o[b * kValueTiles + d] = SCORES(0.0);
      }
      if (begin < end) {
        load_keys(k + int64_t(first_key) * k_pitch, k_pitch, batch.limit - 1 - first_key);
      }
      barrier();
      store_keys();
      [[dont_unroll]] for (int key = first_key; key < end; key += int(kKeys)) {
        const int next = key + int(kKeys);
        barrier();  // K is there; nobody reads the last V
        load_values(v + int64_t(key) * v_pitch, v_pitch, batch.limit - 1 - key);
        multiply_keys();
        if (kShared) barrier();  // nobody reads this K
        store_values(odd);
        load_keys(k + int64_t(next) * k_pitch, k_pitch, batch.limit - 1 - next);
        finish_scores(key, key >= late.x && next <= early.y);
        soften_scores(factor);
        barrier();  // V is there; nobody reads this K
        if (!kShared) store_keys();
        multiply_values();
        if (kShared) {
          barrier();  // nobody reads this V
          store_keys();
        }
      }
      if (odd) break;
      if (is_odd()) s_odd = split + 1;
      barrier();
      odd = s_odd == split + 1;
      if (!odd) break;
    }

    const SCORES place = places();
    write_ml(place);
    if (odd) {
      barrier();  // nobody reads V
      note_odd_values(k, v, k_pitch, v_pitch, begin, end);
      mark_outputs(place);
    }
    write_split(place, split);
  }
}

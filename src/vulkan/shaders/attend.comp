#version 460
#extension GL_GOOGLE_include_directive : require
// Prefill: a tile of rows of one group against splits of keys. A split is reduced from the empty
// state, tile of keys after tile of keys, counted from the split's begin; so a row's bits depend on
// neither its place in the tile nor the rows beside it.
#include "common.glsl"

// A workgroup is kTy x kTx threads, x innermost but for kWoven rows of them, whose threads take
// turns (as in CUTLASS's SIMT layout, RowMajorInterleaved): lanes that read shared memory together
// then read fewer words of it. A thread holds the scores of kTr rows x kTc keys and the outputs of
// the same rows x kGroups groups of four columns. All are powers of two except kGroups; kWoven *
// kTx is at most the subgroup's size, so that a row stays in one subgroup.
layout(constant_id = 16) const uint kTy = 8;
layout(constant_id = 17) const uint kTx = 8;
layout(constant_id = 18) const uint kTr = 4;
layout(constant_id = 19) const uint kTc = 4;
layout(constant_id = 20) const uint kGroups = 2;
layout(constant_id = 21) const uint kSliceWords = 4;  // 16-byte words of a row in shared memory
layout(constant_id = 22) const uint kSliceKeys = 8;   // keys of V in shared memory
layout(constant_id = 23) const uint kWoven = 1;
layout(constant_id = 24) const bool kPartial = false;

const uint kThreads = kTy * kTx;
const uint kRows = kTy * kTr;
const uint kKeys = kTx * kTc;
const uint kRowVecs = kRows / 4;
const uint kKeyVecs = kKeys / 4;
const uint kTrVecs = kTr / 4;
const uint kTcVecs = kTc / 4;
const uint kColumns = kGroups * kTx;  // groups of four columns, those past kValueVecs unused

// Slices of q and k, transposed: [element][row or key]; later the weights: [key][row]. Slices are
// twofold, and loaded one ahead: one is written while another is read.
const uint kSliceElements = kSliceWords * kElements;
const uint kSliceVecs = kSliceElements * (kRowVecs + kKeyVecs);
const uint kWeightVecs = kKeys * kRowVecs;
const uint kValueSliceVecs = kSliceKeys * kColumns;
shared vec4 s_stage[2 * kSliceVecs > kWeightVecs ? 2 * kSliceVecs : kWeightVecs];
shared vec4 s_v[2 * kValueSliceVecs];
shared vec2 s_ml[kRows];
shared uint s_redo;  // 1 + the last split whose output has to be weighed again

// A thread loads blocks of one 16-byte word of four rows or keys, and single words of v.
const uint kBlocks = kSliceWords * (kRowVecs + kKeyVecs);
const uint kRounds = (kBlocks + kThreads - 1) / kThreads;
const uint kValueRounds = (kSliceKeys * kValueWords + kThreads - 1) / kThreads;

// The column of a vec4 in its line of s_stage; spreads what a subgroup writes over the banks.
uint swizzle(uint w, uint vecs) { return w * (8 / kSliceWords) & 7 & (vecs - 1); }
uint weight_swizzle(uint key) { return (key >> 2) & 7 & (kRowVecs - 1); }

// The thread's place; the state that lasts for a split.
uint t_x, t_y, t_id;
uint t_group, t_first, t_last;  // absolute group; index of the tile's first row; its last row
uint64_t t_q;                   // the first row's
int64_t t_k_pitch, t_v_pitch;
vec4 t_o[kTr * kGroups];
float t_s[kTr * kTc];
uvec4 t_slice[4 * kRounds], t_values[kValueRounds];  // loaded ahead

// Loads words `word`.. of the tile's rows and of the keys from `key` on; in the place of those that
// are not there, the last: nothing is made of them.
void load_slice(uint64_t k, int key, int limit, uint word) {
  [[unroll]] for (uint round = 0; round < kRounds; ++round) {
    const uint b = round * kThreads + t_id;
    if (b >= kBlocks) continue;
    const uint w = min(word + b % kSliceWords, kHeadWords - 1), column = b / kSliceWords;
    const bool row = column < kRowVecs;
    const int first = row ? int(4 * column) : key + int(4 * (column - kRowVecs));
    const int last = row ? int(t_last) : limit - 1;
    const int64_t pitch = row ? int64_t(16 * kHeadWords) : t_k_pitch;
    const uint64_t from = (row ? t_q : k) + 16 * w;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      t_slice[4 * round + i] = load_words(from + int64_t(min(first + int(i), last)) * pitch);
    }
  }
}

// Transposes the blocks into one of the two slices.
void store_slice(uint slice) {
  [[unroll]] for (uint round = 0; round < kRounds; ++round) {
    const uint b = round * kThreads + t_id;
    if (b >= kBlocks) continue;
    const uint w = b % kSliceWords, column = b / kSliceWords;
    const bool row = column < kRowVecs;
    const uint vecs = row ? kRowVecs : kKeyVecs;
    const uint place = row ? column : column - kRowVecs;
    const uint at = slice * kSliceVecs + (row ? 0 : kSliceElements * kRowVecs) +
                    w * kElements * vecs + (place ^ swizzle(w, vecs));
    [[unroll]] for (uint part = 0; part < kVecs; ++part) {
      const mat4 rows = mat4(elements(t_slice[4 * round], part),      //
                             elements(t_slice[4 * round + 1], part),  //
                             elements(t_slice[4 * round + 2], part),  //
                             elements(t_slice[4 * round + 3], part));
      const mat4 lines = transpose(rows);
      [[unroll]] for (uint i = 0; i < 4; ++i) s_stage[at + (4 * part + i) * vecs] = lines[i];
    }
  }
}

void load_values(uint64_t v, int key, int limit) {
  [[unroll]] for (uint round = 0; round < kValueRounds; ++round) {
    const uint b = round * kThreads + t_id;
    if (b >= kSliceKeys * kValueWords) continue;
    const int at = min(key + int(b / kValueWords), limit - 1);
    t_values[round] = load_words(v + int64_t(at) * t_v_pitch + 16 * (b % kValueWords));
  }
}

void store_values(uint slice) {
  [[unroll]] for (uint round = 0; round < kValueRounds; ++round) {
    const uint b = round * kThreads + t_id;
    if (b >= kSliceKeys * kValueWords) continue;
    [[unroll]] for (uint part = 0; part < kVecs; ++part) {
      s_v[slice * kValueSliceVecs + b / kValueWords * kColumns + b % kValueWords * kVecs + part] =
          elements(t_values[round], part);
    }
  }
}

// q.k of a tile: chains of fma over ascending elements. The first slice is loaded already.
void multiply(uint64_t k, int key, int limit) {
  [[unroll]] for (uint i = 0; i < kTr * kTc; ++i) t_s[i] = 0.0;
  store_slice(0);
  barrier();
  uint slice = 0;
  [[dont_unroll]] for (uint word = 0; word < kHeadWords; word += kSliceWords) {
    const bool more = word + kSliceWords < kHeadWords;
    if (more) load_slice(k, key, limit, word + kSliceWords);
    const uint words = min(kSliceWords, kHeadWords - word);
    [[dont_unroll]] for (uint w = 0; w < words; ++w) {
      const uint row_at = slice * kSliceVecs + w * kElements * kRowVecs;
      const uint key_at = slice * kSliceVecs + kSliceElements * kRowVecs + w * kElements * kKeyVecs;
      uint row_column[kTrVecs], key_column[kTcVecs];
      [[unroll]] for (uint j = 0; j < kTrVecs; ++j) {
        row_column[j] = row_at + ((t_y * kTrVecs + j) ^ swizzle(w, kRowVecs));
      }
      [[unroll]] for (uint j = 0; j < kTcVecs; ++j) {
        key_column[j] = key_at + ((j * kTx + t_x) ^ swizzle(w, kKeyVecs));
      }
      [[unroll]] for (uint e = 0; e < kElements; ++e) {
        vec4 a[kTrVecs], b[kTcVecs];
        [[unroll]] for (uint j = 0; j < kTrVecs; ++j) a[j] = s_stage[row_column[j] + e * kRowVecs];
        [[unroll]] for (uint j = 0; j < kTcVecs; ++j) b[j] = s_stage[key_column[j] + e * kKeyVecs];
        [[unroll]] for (uint r = 0; r < kTr; ++r) {
          [[unroll]] for (uint c = 0; c < kTc; ++c) {
            t_s[r * kTc + c] = fma(a[r / 4][r % 4], b[c / 4][c % 4], t_s[r * kTc + c]);
          }
        }
      }
    }
    slice = 1 - slice;
    if (more) store_slice(slice);
    barrier();
  }
}

uint key_of(uint c) { return c / 4 * 4 * kTx + 4 * t_x + c % 4; }

// Products to weights in shared memory; m, l and o follow.
void soften(uint batch_index, Batch batch, int key, int split_end, bool whole) {
  float most[kTr];
  [[unroll]] for (uint r = 0; r < kTr; ++r) {
    const uint index = t_first + t_y * kTr + r;
    ivec2 range = ivec2(0, 0x7fffffff);
    if (!whole) {
      range = visible(batch, index / params.heads);
      range.y = index < params.index_end ? min(range.y, split_end) : 0;
    }
    most[r] = hidden();
    uint64_t mask = 0;
    if (kMaskType != 0) mask = mask_address(batch_index, t_group, index);
    [[unroll]] for (uint c = 0; c < kTc; ++c) {
      const int at = key + int(key_of(c));
      float s = hidden();
      if (kMaskType == 0) {
        s = score(t_s[r * kTc + c], 0);
        s = whole || (at >= range.x && at < range.y) ? s : hidden();
      } else if (at >= range.x && at < range.y) {
        s = score(t_s[r * kTc + c], mask + int64_t(at) * params.mask_key);
      }
      t_s[r * kTc + c] = s;
      most[r] = s > most[r] ? s : most[r];
    }
  }
  [[unroll]] for (uint lanes = 1; lanes < kTx; lanes *= 2) {
    [[unroll]] for (uint r = 0; r < kTr; ++r) {
      const float other = subgroupShuffleXor(most[r], kWoven * lanes);
      most[r] = other > most[r] ? other : most[r];
    }
  }
  float sum[kTr], factor[kTr];
  vec2 ml[kTr];
  [[unroll]] for (uint r = 0; r < kTr; ++r) {
    ml[r] = s_ml[t_y * kTr + r];
    const float m = most[r] > ml[r].x && !is_nan(ml[r].x) ? most[r] : ml[r].x;
    const float base = base_of(m);
    precise float change = ml[r].x - base;
    factor[r] = exp_nonpositive(change);
    ml[r].x = m;
    precise float l = 0.0;
    [[unroll]] for (uint c = 0; c < kTc; ++c) {
      precise float x = t_s[r * kTc + c] - base;
      t_s[r * kTc + c] = exp_nonpositive(x);
      l = l + t_s[r * kTc + c];
    }
    sum[r] = l;
  }
  [[unroll]] for (uint lanes = 1; lanes < kTx; lanes *= 2) {
    [[unroll]] for (uint r = 0; r < kTr; ++r) {
      precise float both = sum[r] + subgroupShuffleXor(sum[r], kWoven * lanes);
      sum[r] = both;
    }
  }
  subgroupBarrier();  // all lanes of a row have read its m, l
  [[unroll]] for (uint r = 0; r < kTr; ++r) {
    precise float kept = ml[r].y * factor[r];
    precise float l = kept + sum[r];
    l = factor[r] == 0.0 ? sum[r] : l;
    // A NaN score, or one of +Inf: the row stays NaN whatever follows.
    const float m = is_nan(l) ? nan() : ml[r].x;
    [[unroll]] for (uint g = 0; g < kGroups; ++g) {
      precise vec4 scaled = t_o[r * kGroups + g] * factor[r];
      t_o[r * kGroups + g] = factor[r] == 0.0 ? vec4(0) : scaled;
    }
    if (t_x == 0) s_ml[t_y * kTr + r] = vec2(m, l);
  }
  [[unroll]] for (uint c = 0; c < kTc; ++c) {
    const uint k = key_of(c);
    [[unroll]] for (uint j = 0; j < kTrVecs; ++j) {
      s_stage[k * kRowVecs + ((t_y * kTrVecs + j) ^ weight_swizzle(k))] =
          vec4(t_s[(4 * j) * kTc + c], t_s[(4 * j + 1) * kTc + c],  //
               t_s[(4 * j + 2) * kTc + c], t_s[(4 * j + 3) * kTc + c]);
    }
  }
}

// o += weights times values of keys [first, last) of the tile that begins at `key`, in whole
// slices: chains of fma over ascending keys. The first slice is loaded already. `exact` passes over
// weights of 0.
void weigh(uint64_t v, int key, uint first, uint last, int limit, bool exact) {
  store_values(0);
  barrier();
  uint slice = 0;
  [[dont_unroll]] for (; first < last; first += kSliceKeys) {
    const bool more = first + kSliceKeys < last;
    if (more) load_values(v, key + int(first + kSliceKeys), limit);
    const uint values_at = slice * kValueSliceVecs + t_x;
    [[dont_unroll]] for (uint four = 0; four < kSliceKeys; four += 4) {
      uint columns[kTrVecs];
      [[unroll]] for (uint j = 0; j < kTrVecs; ++j) {
        columns[j] =
            (first + four) * kRowVecs + ((t_y * kTrVecs + j) ^ weight_swizzle(first + four));
      }
      if (!exact) {
        [[unroll]] for (uint i = 0; i < 4; ++i) {
          vec4 p[kTrVecs], values[kGroups];
          [[unroll]] for (uint j = 0; j < kTrVecs; ++j) p[j] = s_stage[columns[j] + i * kRowVecs];
          [[unroll]] for (uint g = 0; g < kGroups; ++g) {
            values[g] = s_v[values_at + (four + i) * kColumns + g * kTx];
          }
          [[unroll]] for (uint r = 0; r < kTr; ++r) {
            [[unroll]] for (uint g = 0; g < kGroups; ++g) {
              t_o[r * kGroups + g] = fma(vec4(p[r / 4][r % 4]), values[g], t_o[r * kGroups + g]);
            }
          }
        }
      } else {
        [[dont_unroll]] for (uint i = 0; i < 4; ++i) {
          vec4 p[kTrVecs];
          [[unroll]] for (uint j = 0; j < kTrVecs; ++j) p[j] = s_stage[columns[j] + i * kRowVecs];
          [[unroll]] for (uint g = 0; g < kGroups; ++g) {
            const vec4 value = s_v[values_at + (four + i) * kColumns + g * kTx];
            [[unroll]] for (uint r = 0; r < kTr; ++r) {
              const vec4 sum = fma(vec4(p[r / 4][r % 4]), value, t_o[r * kGroups + g]);
              t_o[r * kGroups + g] = p[r / 4][r % 4] == 0.0 ? t_o[r * kGroups + g] : sum;
            }
          }
        }
      }
    }
    slice = 1 - slice;
    if (more) store_values(slice);
    barrier();
  }
}

// Whether a column of a row that is not all NaN holds a NaN or Inf: from a value of a key that it
// sees, or from a weight of 0.
bool suspicious() {
  bool found = false;
  [[unroll]] for (uint r = 0; r < kTr; ++r) {
    const bool numbers = !is_nan(s_ml[t_y * kTr + r].y);
    [[unroll]] for (uint g = 0; g < kGroups; ++g) {
      if (numbers && g * kTx + t_x < kValueVecs) found = found || !is_finite(t_o[r * kGroups + g]);
    }
  }
  return found;
}

// The rows' partial states of a split: into the wave's, or merged into the running states.
void finish(uint split) {
  [[unroll]] for (uint r = 0; r < kTr; ++r) {
    const uint index = t_first + t_y * kTr + r;
    const vec2 part = s_ml[t_y * kTr + r];
    const bool seen = part.y != 0.0;
    const bool inside = index < params.index_end;
    if (kPartial) {
      if (!inside) continue;
      const uint64_t at = partial_index(gl_WorkGroupID.z, split - params.split, index);
      if (t_x == 0) Vec2(params.partial_ml + 8 * at).value = seen ? part : vec2(hidden(), -1.0);
      if (!seen) continue;
      [[unroll]] for (uint g = 0; g < kGroups; ++g) {
        const uint column = g * kTx + t_x;
        if (column >= kValueVecs) continue;
        Vec4(params.partial_o + (at * kValueVecs + column) * 16).value =
            positive_zero(t_o[r * kGroups + g]);
      }
    } else {
      const uint64_t at = state_index(t_group, index);
      // One lane keeps m and l in memory, as only it may read what it wrote without a barrier.
      vec2 state = vec2(0);
      if (t_x == 0 && inside) state = Vec2(params.ml + 8 * at).value;
      const uint lane = gl_SubgroupInvocationID - kWoven * t_x;
      state = vec2(subgroupShuffle(state.x, lane), subgroupShuffle(state.y, lane));
      if (!inside || !seen) continue;
      const vec2 factors = merge_factors(state, part);
      if (t_x == 0) Vec2(params.ml + 8 * at).value = state;
      [[unroll]] for (uint g = 0; g < kGroups; ++g) {
        const uint column = g * kTx + t_x;
        if (column >= kValueVecs) continue;
        Vec4 o = Vec4(params.o + (at * kValueVecs + column) * 16);
        o.value = merge_values(o.value, positive_zero(t_o[r * kGroups + g]), factors);
      }
    }
  }
}

void main() {
  t_id = gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID;
  t_x = t_id / kWoven % kTx;
  t_y = t_id / (kWoven * kTx) * kWoven + t_id % kWoven;
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

  t_last = index_last - t_first;
  t_q = params.q + state_index(t_group, t_first) * kHeadWords * 16;
  t_k_pitch = params.k_key;
  t_v_pitch = params.v_key;

  if (t_id == 0) s_redo = 0;
  const uint split_first = params.split + (kPartial ? gl_WorkGroupID.y : 0);
  const uint split_last = kPartial ? split_first + 1 : params.split + params.num_splits;
  [[dont_unroll]] for (uint split = split_first; split < split_last; ++split) {
    const int split_begin = int(split * kSplitLen);
    const int split_end = split_begin + int(kSplitLen);
    const int begin = max(early.x, split_begin), end = min(late.y, split_end);
    if (!kPartial && begin >= end) continue;
    bool exact = false;
    [[dont_unroll]] for (;;) {
      [[unroll]] for (uint i = 0; i < kTr * kGroups; ++i) t_o[i] = vec4(0);
      barrier();
      for (uint r = t_id; r < kRows; r += kThreads) s_ml[r] = vec2(hidden(), 0.0);
      barrier();
      const int tile = begin < end ? begin - (begin - split_begin) % int(kKeys) : end;
      if (begin < end) load_slice(k, tile, batch.limit, 0);
      [[dont_unroll]] for (int key = tile; key < end; key += int(kKeys)) {
        // Slices of v that no row of the tile sees are passed over.
        const uint first_key = uint(max(begin - key, 0)) / kSliceKeys * kSliceKeys;
        const uint last_key = min(uint(end - key), kKeys);
        multiply(k, key, batch.limit);
        const bool whole = key >= late.x && key + int(kKeys) <= min(early.y, split_end) &&
                           t_first + kRows <= params.index_end;
        load_values(v, key + int(first_key), batch.limit);  // on their way during the softmax
        soften(batch_index, batch, key, split_end, whole);
        if (key + int(kKeys) < end) load_slice(k, key + int(kKeys), batch.limit, 0);
        weigh(v, key, first_key, last_key, batch.limit, exact);
      }
      if (exact) break;
      if (suspicious()) s_redo = split + 1;
      barrier();
      if (s_redo != split + 1) break;
      exact = true;
    }
    finish(split);
  }
}

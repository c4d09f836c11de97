#version 460
#extension GL_GOOGLE_include_directive : require
// Decode: few rows of one group against one split of keys; gives partial states for merge.comp.
// K and V go straight from memory to registers, 16 bytes a lane; lanes side by side share a key.
// The order of every sum is fixed by the split and the constants, and is the same for each kRows.
#include "common.glsl"

layout(constant_id = 16) const uint kSubgroups = 4;
layout(constant_id = 17) const uint kSubgroupSize = 8;
layout(constant_id = 18) const uint kRows = 4;        // 1, 2, 4 or 8
layout(constant_id = 19) const uint kHeadLanes = 8;   // that share a key; powers of two, at most
layout(constant_id = 20) const uint kValueLanes = 8;  // the subgroup's size

const uint kThreads = kSubgroups * kSubgroupSize;
const uint kHeadPer = (kHeadWords + kHeadLanes - 1) / kHeadLanes;  // words of a key in a lane
const uint kValuePer = (kValueWords + kValueLanes - 1) / kValueLanes;
const uint kBatch = kHeadPer == 1 ? 4 : kHeadPer == 2 ? 2 : 1;  // keys a lane loads at a time
const uint kValueBatch = kValuePer == 1 ? 4 : kValuePer == 2 ? 2 : 1;
const uint kItems = kBatch * kRows;  // scores that kHeadLanes lanes work on together
const uint kHeadStep = kThreads / kHeadLanes * kBatch;  // keys that the workgroup takes at a time
const uint kValueStep = kThreads / kValueLanes * kValueBatch;
const uint kValueParts = kValuePer * kVecs;  // groups of four columns in a lane

shared vec4 s_scores[kRows * kSplitLen / 4];  // of four keys of a row; then the weights
shared vec4 s_o[kSubgroups * kValueLanes * kValueParts];
shared vec2 s_ml[kRows];
shared ivec2 s_range[kRows];  // keys of the split that each row sees
shared uint s_redo;

uint t_id, t_lane, t_first;
ivec2 t_range;  // keys of the split that any row sees
int64_t t_k_pitch, t_v_pitch;
vec4 t_q[kRows * kHeadPer * kVecs];
float t_x[kItems];
vec4 t_o[kRows * kValueParts];
uvec4 t_k[kBatch * kHeadPer], t_v[kValueBatch * kValuePer];  // loaded ahead

float read_score(uint row, int key) {
  const uint at = row * kSplitLen + key;
  return s_scores[at / 4][at % 4];
}
void write_score(uint row, int key, float x) {
  const uint at = row * kSplitLen + key;
  s_scores[at / 4][at % 4] = x;
}

// The nearest key that a row sees: what is loaded in the place of others gets no weight.
uint64_t nearest(int key) { return uint64_t(clamp(key, t_range.x, t_range.y - 1)); }

void load_q(uint group, uint lane) {
  [[unroll]] for (uint r = 0; r < kRows; ++r) {
    [[unroll]] for (uint j = 0; j < kHeadPer; ++j) {
      const uint w = j * kHeadLanes + lane;
      uvec4 word = uvec4(0);
      if (w < kHeadWords && t_first + r < params.index_end) {
        word = load_words(params.q + (state_index(group, t_first + r) * kHeadWords + w) * 16);
      }
      [[unroll]] for (uint part = 0; part < kVecs; ++part) {
        t_q[(r * kHeadPer + j) * kVecs + part] = elements(word, part);
      }
    }
  }
}

// Adds t_x over the lanes that share a key. Where a lane holds several items, it gives half of
// them away and keeps the other half; the tree of an item's sum is the same either way. Returns the
// first item that is left in this lane, of kItems / kHeadLanes or one.
uint reduce_items(uint lane) {
  uint first = 0;
  [[unroll]] for (uint step = 0; step < 7; ++step) {
    const uint mask = kHeadLanes >> (step + 1), kept = kItems >> (step + 1);
    if (mask == 0) continue;
    const bool upper = (lane & mask) != 0;
    if (kept == 0) {
      precise float sum = t_x[0] + subgroupShuffleXor(t_x[0], mask);
      t_x[0] = sum;
    } else {
      [[unroll]] for (uint j = 0; j < kept; ++j) {
        const float mine = upper ? t_x[j + kept] : t_x[j];
        const float other = upper ? t_x[j] : t_x[j + kept];
        precise float sum = mine + subgroupShuffleXor(other, mask);
        t_x[j] = sum;
      }
      first += upper ? kept : 0;
    }
  }
  return first;
}

// The words of this lane of the keys that begin at `step`.
void load_keys(uint64_t k, int step) {
  const uint lane = t_id % kHeadLanes;
  [[unroll]] for (uint i = 0; i < kBatch; ++i) {
    const int key = step + int(t_id / kHeadLanes * kBatch + i);
    const uint64_t from = k + nearest(key) * t_k_pitch + 16 * lane;
    [[unroll]] for (uint j = 0; j < kHeadPer; ++j) {
      t_k[i * kHeadPer + j] = uvec4(0);
      if (kHeadPer * kHeadLanes > kHeadWords && j * kHeadLanes + lane >= kHeadWords) continue;
      t_k[i * kHeadPer + j] = load_words(from + 16 * kHeadLanes * j);
    }
  }
}

// Scores of the keys of the split that begin at `from`, in steps of kHeadStep. k and v point at the
// split's first key.
void score_keys(uint64_t k, uint batch_index, uint group, int split_begin, int from) {
  const uint lane = t_id % kHeadLanes;
  const int stream = int(t_id / kHeadLanes * kBatch);
  const uint kLeft = kItems / kHeadLanes > 0 ? kItems / kHeadLanes : 1;
  uvec4 words[kBatch * kHeadPer];
  load_keys(k, from);
  [[dont_unroll]] for (int step = from; step < t_range.y; step += int(kHeadStep)) {
    [[unroll]] for (uint i = 0; i < kBatch * kHeadPer; ++i) words[i] = t_k[i];
    load_keys(k, step + int(kHeadStep));  // on their way while these are multiplied
    [[unroll]] for (uint i = 0; i < kItems; ++i) t_x[i] = 0.0;
    [[unroll]] for (uint i = 0; i < kBatch; ++i) {
      [[unroll]] for (uint j = 0; j < kHeadPer; ++j) {
        [[unroll]] for (uint part = 0; part < kVecs; ++part) {
          const vec4 x = elements(words[i * kHeadPer + j], part);
          [[unroll]] for (uint e = 0; e < 4; ++e) {
            [[unroll]] for (uint r = 0; r < kRows; ++r) {
              t_x[i * kRows + r] = fma(t_q[(r * kHeadPer + j) * kVecs + part][e], x[e],  //
                                       t_x[i * kRows + r]);
            }
          }
        }
      }
    }
    const uint first = reduce_items(lane);
    [[unroll]] for (uint i = 0; i < kLeft; ++i) {
      const uint r = (first + i) % kRows;
      const int key = step + stream + int((first + i) / kRows);
      const ivec2 range = s_range[r];
      if (key >= int(kSplitLen)) continue;
      float s = hidden();
      if (key >= range.x && key < range.y) {
        uint64_t mask = 0;
        if (kMaskType != 0) {
          mask = mask_address(batch_index, group, t_first + r) +
                 int64_t(split_begin + key) * params.mask_key;
        }
        s = score(t_x[i], mask);
      }
      write_score(r, key, s);
    }
  }
}

// Scores to weights; a subgroup takes a row. Keys before `from` have no score. Those of the steps
// of weigh(), which begin at `value_from`, that no row sees get a weight of 0.
void soften(int from, int value_from) {
  const int lane = int(gl_SubgroupInvocationID);
  const int begin = from / int(kSubgroupSize) * int(kSubgroupSize);
  const int value_begin = min(begin, value_from / int(kSubgroupSize) * int(kSubgroupSize));
  const int value_end = (t_range.y + int(kValueStep) - 1) / int(kValueStep) * int(kValueStep);
  [[dont_unroll]] for (uint r = gl_SubgroupID; r < kRows; r += kSubgroups) {
    float most = hidden();
    for (int key = begin + lane; key < t_range.y; key += int(kSubgroupSize)) {
      const float s = key >= from ? read_score(r, key) : hidden();
      most = s > most ? s : most;
    }
    [[unroll]] for (uint lanes = 1; lanes < kSubgroupSize; lanes *= 2) {
      const float other = subgroupShuffleXor(most, lanes);
      most = other > most ? other : most;
    }
    const float base = base_of(most);
    precise float l = 0.0;
    for (int key = value_begin + lane; key < value_end; key += int(kSubgroupSize)) {
      float p = 0.0;
      if (key >= from && key < t_range.y) {
        precise float x = read_score(r, key) - base;
        p = exp_nonpositive(x);
      }
      write_score(r, key, p);
      l = l + p;
    }
    [[unroll]] for (uint lanes = 1; lanes < kSubgroupSize; lanes *= 2) {
      l = l + subgroupShuffleXor(l, lanes);
    }
    // A NaN score, or one of +Inf: the row stays NaN whatever it is merged with.
    if (lane == 0) s_ml[r] = vec2(is_nan(l) ? nan() : most, l);
  }
}

void load_values(uint64_t v, int step) {
  const uint lane = t_id % kValueLanes;
  [[unroll]] for (uint i = 0; i < kValueBatch; ++i) {
    const int key = step + int(t_id / kValueLanes * kValueBatch + i);
    const uint64_t from = v + nearest(key) * t_v_pitch + 16 * lane;
    [[unroll]] for (uint j = 0; j < kValuePer; ++j) {
      t_v[i * kValuePer + j] = uvec4(0);
      if (kValuePer * kValueLanes > kValueWords && j * kValueLanes + lane >= kValueWords) continue;
      t_v[i * kValuePer + j] = load_words(from + 16 * kValueLanes * j);
    }
  }
}

// t_o = weights times values; `exact` passes over weights of 0. t_v holds the first values.
void weigh(uint64_t v, int from, bool exact) {
  const int stream = int(t_id / kValueLanes * kValueBatch);
  [[unroll]] for (uint i = 0; i < kRows * kValueParts; ++i) t_o[i] = vec4(0);
  uvec4 words[kValueBatch * kValuePer];
  [[dont_unroll]] for (int step = from; step < t_range.y; step += int(kValueStep)) {
    [[unroll]] for (uint i = 0; i < kValueBatch * kValuePer; ++i) words[i] = t_v[i];
    load_values(v, step + int(kValueStep));
    vec4 weights[kRows];
    [[unroll]] for (uint r = 0; r < kRows; ++r) {
      weights[r] = s_scores[(r * kSplitLen + step + stream) / 4];
    }
    [[unroll]] for (uint i = 0; i < kValueBatch; ++i) {
      float p[kRows];
      [[unroll]] for (uint r = 0; r < kRows; ++r) {
        p[r] = weights[r][kValueBatch == 4 ? i : (stream + i) % 4];
      }
      [[unroll]] for (uint j = 0; j < kValueParts; ++j) {
        const vec4 x = elements(words[i * kValuePer + j / kVecs], j % kVecs);
        [[unroll]] for (uint r = 0; r < kRows; ++r) {
          const uint at = r * kValueParts + j;
          const vec4 sum = fma(vec4(p[r]), x, t_o[at]);
          t_o[at] = exact && p[r] == 0.0 ? t_o[at] : sum;
        }
      }
    }
  }
}

// Adds t_o over the workgroup, lanes first, then subgroups in ascending order, and writes it.
// Returns whether a row that is not all NaN holds a NaN or Inf.
bool write(uint split) {
  bool found = false;
  const uint lane = t_id % kValueLanes;
  [[unroll]] for (uint r = 0; r < kRows; ++r) {
    [[unroll]] for (uint j = 0; j < kValueParts; ++j) {
      precise vec4 sum = t_o[r * kValueParts + j];
      [[unroll]] for (uint step = 0; step < 7; ++step) {
        const uint mask = kValueLanes << step;
        if (mask < kSubgroupSize) sum = sum + subgroupShuffleXor(sum, mask);
      }
      if (gl_SubgroupInvocationID < kValueLanes) {
        s_o[(gl_SubgroupID * kValueParts + j) * kValueLanes + lane] = sum;
      }
    }
    barrier();
    const vec2 ml = s_ml[r];
    if (t_first + r < params.index_end) {
      const uint64_t at = partial_index(gl_WorkGroupID.z, split, t_first + r);
      const vec2 marked = ml.y != 0.0 ? ml : vec2(hidden(), -1.0);
      if (t_id == 0) Vec2(params.partial_ml + 8 * at).value = marked;
      for (uint i = t_id; i < kValueLanes * kValueParts; i += kThreads) {
        const uint j = i / kValueLanes, w = j / kVecs * kValueLanes + i % kValueLanes;
        if (w >= kValueWords || ml.y == 0.0) continue;
        precise vec4 sum = s_o[i];
        for (uint s = 1; s < kSubgroups; ++s) sum = sum + s_o[s * kValueParts * kValueLanes + i];
        found = found || (!is_nan(ml.y) && !is_finite(sum));
        Vec4(params.partial_o + (at * kValueVecs + w * kVecs + j % kVecs) * 16).value =
            positive_zero(sum);
      }
    }
    barrier();
  }
  return found;
}

void main() {
  t_id = gl_SubgroupID * kSubgroupSize + gl_SubgroupInvocationID;
  t_first = params.index_begin + gl_WorkGroupID.x * kRows;
  const uint split = gl_WorkGroupID.y;
  const uint group = params.group + gl_WorkGroupID.z;
  const uint batch_index = group / params.kv_heads, kv_head = group % params.kv_heads;
  const Batch batch = Batches(params.batches).at[batch_index];
  const uint64_t k =
      params.k + int64_t(batch_index) * params.k_batch + int64_t(kv_head) * params.k_head;
  const uint64_t v =
      params.v + int64_t(batch_index) * params.v_batch + int64_t(kv_head) * params.v_head;
  const int split_begin = int((params.split + split) * kSplitLen);

  const uint index_last = min(t_first + kRows, params.index_end) - 1;
  t_range =
      ivec2(visible(batch, t_first / params.heads).x, visible(batch, index_last / params.heads).y);
  t_range = clamp(t_range - split_begin, ivec2(0), ivec2(kSplitLen));
  if (t_range.x >= t_range.y)
    t_range = ivec2(0);  // no step is begun for the sake of its first keys
  if (t_id < kRows) {
    ivec2 range = visible(batch, (t_first + t_id) / params.heads) - split_begin;
    if (t_first + t_id >= params.index_end) range = ivec2(0);
    s_range[t_id] = clamp(range, ivec2(0), ivec2(kSplitLen));
  }
  if (t_id == 0) s_redo = 0;
  load_q(group, t_id % kHeadLanes);
  barrier();
  t_k_pitch = params.k_key;
  t_v_pitch = params.v_key;
  const uint64_t split_k = k + int64_t(split_begin) * t_k_pitch;
  const uint64_t split_v = v + int64_t(split_begin) * t_v_pitch;
  const int from = t_range.x / int(kHeadStep) * int(kHeadStep);
  const int value_from = t_range.x / int(kValueStep) * int(kValueStep);
  if (t_range.x < t_range.y) score_keys(split_k, batch_index, group, split_begin, from);
  if (t_range.x < t_range.y) load_values(split_v, value_from);  // on their way during the softmax
  barrier();
  soften(from, value_from);
  barrier();
  bool exact = false;
  [[dont_unroll]] for (;;) {
    if (exact) {
      weigh(split_v, value_from, true);
    } else {
      weigh(split_v, value_from, false);
    }
    if (write(split)) s_redo = 1;
    barrier();
    if (exact || s_redo == 0) break;
    exact = true;
    if (t_range.x < t_range.y) load_values(split_v, value_from);
  }
}

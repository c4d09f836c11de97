// The end of a split for matrix.comp: Inf and NaN of V, then the merge into the state, or a partial
// state.

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

// Whether an output is Inf or NaN: V may hold some, which have to be kept out of the products.
bool is_odd() {
  bool odd = false;
  [[unroll]] for (uint i = 0; i < kBlocks * kValueTiles; ++i) {
    [[unroll]] for (uint e = 0; e < t_o[i].length(); ++e) {
      odd = odd || (floatBitsToUint(t_o[i][e]) & 0x7f800000u) == 0x7f800000u;
    }
  }
  return odd;
}

// Each row's (m, l) of the split.
void write_ml(SCORES place) {
  [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
    SCORES l = t_l[b];
    if (kPairs == 0) l = reduce_rows(l, true);
    const vec2 pair_l = reduce_pair(t_pair_l[b], true);
    [[unroll]] for (uint e = 0; e < place.length(); ++e) {
      if (column_of(place[e]) == 0) {
        const float sum = (kPairs != 0 ? pair_l[pair_of(e)] : l[e]) * kWeightUnit;
        const float m = kPairs != 0 ? t_pair_m[b][pair_of(e)] : t_m[b][e];
        s_ml[row_of(b, place[e])] =
            vec2(sum == 0.0 ? hidden() : m * (kFinished ? 1.0 : params.scale), sum);
      }
    }
  }
}

void mark_outputs(SCORES place) {
  [[unroll]] for (uint i = 0; i < kBlocks * kValueTiles; ++i) {
    const uint b = i / kValueTiles, column = i % kValueTiles * kN;
    [[unroll]] for (uint e = 0; e < place.length(); ++e) {
      t_o[i][e] = marked(t_o[i][e], row_of(b, place[e]), column + column_of(place[e]));
    }
  }
}

void write_split(SCORES place, uint split) {
  for (uint row = gl_SubgroupInvocationID; row < kOwnRows; row += gl_SubgroupSize) {
    merge_row(t_row + row, split);
  }
  sync();
  [[unroll]] for (uint i = 0; i < kBlocks * kValueTiles; ++i) {
    const uint b = i / kValueTiles, column = i % kValueTiles * kN;
    [[unroll]] for (uint e = 0; e < place.length(); ++e) {
      write_element(row_of(b, place[e]), column + column_of(place[e]), split,
                    t_o[i][e] * kWeightUnit);
    }
  }
  sync();
}

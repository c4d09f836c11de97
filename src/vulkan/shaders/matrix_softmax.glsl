// Softmax for matrix.comp, on the elements of matrices where they are.

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

// The scores in t_s of the tile of keys that begins at `key`. `seen`: each row sees all of them.
void finish_scores(int key, bool seen) {
  if (kMaskType != 0 || !seen) {
    const SCORES place = places();
    [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
      const uint b = i / kKeyTiles, column = i % kKeyTiles * kN;
      [[unroll]] for (uint e = 0; e < place.length(); ++e) {
        t_s[i][e] =
            finish_score(t_s[i][e], row_of(b, place[e]), key + int(column + column_of(place[e])));
      }
    }
  } else if (kFinished) {
    [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
      [[unroll]] for (uint e = 0; e < t_s[i].length(); ++e) t_s[i][e] = score(t_s[i][e], 0);
    }
  }
}

float weight_of(float score, float m, float factor) {
  return exp2(fma(score - m, factor, kWeightBits));
}

// Of the two rows that a lane has a part of: their maximum or sum over the four lanes.
vec2 reduce_pair(vec2 x, bool sum) {
  [[unroll]] for (uint lanes = 1; lanes < 4; lanes *= 2) {
    const vec2 other = vec2(subgroupShuffleXor(x[0], lanes), subgroupShuffleXor(x[1], lanes));
    x = sum ? x + other : max(x, other);
  }
  return x;
}
uint pair_of(uint element) { return kPairs >> element & 1; }

// Takes block b over to the maximum `top`; a change of 1 changes no bit. Without a branch: it would
// have the output moved from register to register, which takes as long.
void soften_pairs(uint b, SCORES top, float factor) {
  const uint first = b * kKeyTiles;
  vec2 most = t_pair_m[b], change;
  [[unroll]] for (uint e = 0; e < top.length(); ++e) {
    most[pair_of(e)] = max(most[pair_of(e)], top[e]);
  }
  most = reduce_pair(most, false);
  [[unroll]] for (uint i = 0; i < 2; ++i) {
    change[i] = most[i] == t_pair_m[b][i] ? 1.0 : exp2((t_pair_m[b][i] - most[i]) * factor);
    t_pair_l[b][i] *= change[i];
  }
  t_pair_m[b] = most;
  [[unroll]] for (uint e = 0; e < top.length(); ++e) {
    [[unroll]] for (uint d = 0; d < kValueTiles; ++d) {
      t_o[b * kValueTiles + d][e] *= change[pair_of(e)];
    }
  }
  [[unroll]] for (uint n = 0; n < kKeyTiles; ++n) {
    [[unroll]] for (uint e = 0; e < top.length(); ++e) {
      const float p = weight_of(t_s[first + n][e], most[pair_of(e)], factor);
      t_pair_l[b][pair_of(e)] += p;
      t_s[first + n][e] = round_weight(p);
    }
  }
}
void soften_block(uint b, SCORES top, float factor) {
  const uint first = b * kKeyTiles;
  top = reduce_rows(top, false);
  [[unroll]] for (uint e = 0; e < top.length(); ++e) {
    top[e] = max(t_m[b][e], top[e]);
    const float change = top[e] == t_m[b][e] ? 1.0 : exp2((t_m[b][e] - top[e]) * factor);
    t_l[b][e] *= change;
    [[unroll]] for (uint d = 0; d < kValueTiles; ++d) t_o[b * kValueTiles + d][e] *= change;
  }
  t_m[b] = top;
  [[unroll]] for (uint n = 0; n < kKeyTiles; ++n) {
    [[unroll]] for (uint e = 0; e < top.length(); ++e) {
      const float p = weight_of(t_s[first + n][e], top[e], factor);
      t_l[b][e] += p;
      t_s[first + n][e] = round_weight(p);
    }
  }
}

// The scores in t_s become weights; m, l and the output go over to the new maximum. `factor` is on
// a score in exp2.
void soften_scores(float factor) {
  [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
    const uint first = b * kKeyTiles;
    SCORES top = t_s[first];
    [[unroll]] for (uint n = 1; n < kKeyTiles; ++n) {
      [[unroll]] for (uint e = 0; e < top.length(); ++e) top[e] = max(top[e], t_s[first + n][e]);
    }
    if (kPairs != 0) {
      soften_pairs(b, top, factor);
    } else {
      soften_block(b, top, factor);
    }
  }
}

// Products of tiles for matrix.comp: scores of K, outputs of V.

// t_s = the subgroup's rows of q times the tile of K in shared memory.
void multiply_keys() {
  [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) t_s[i] = SCORES(0.0);
  [[unroll]] for (uint d = 0; d < kHeadSteps; ++d) {
    LEFT rows[kBlocks];
    [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
      if (d < kHeldSteps) {
        rows[b] = t_query[b * kHeldSteps + d];
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
        t_s[b * kKeyTiles + n] = coopMatMulAdd(rows[b], keys, t_s[b * kKeyTiles + n]);
      }
    }
  }
}

#ifndef NV_MATRIX2
// Rounds the weights in t_s on their way through shared memory.
void store_weights() {
  const uint scratch = gl_SubgroupID * kM * kLine;
  [[unroll]] for (uint i = 0; i < kBlocks * kKeyTiles; ++i) {
    const uint row = t_row + i / kKeyTiles * kM, column = i % kKeyTiles * kN;
    sync();
    coopMatStore(t_s[i], s_scratch, scratch, kLine, gl_CooperativeMatrixLayoutRowMajor);
    sync();
    for (uint j = gl_SubgroupInvocationID; j < kM * kN / 8; j += gl_SubgroupSize) {
      const uint at = (row + 8 * j / kN) * kKeys + column + 8 * j % kN;
      s_weights[at / 8] = weight_word(s_scratch[scratch + 2 * j], s_scratch[scratch + 2 * j + 1]);
    }
  }
  sync();
}
#endif

// t_o += the weights in t_s times the tile of V in shared memory.
void multiply_values() {
#ifndef NV_MATRIX2
  store_weights();
#endif
  [[unroll]] for (uint n = 0; n < kKeySteps; ++n) {
    LEFT weights[kBlocks];
    [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
#ifdef NV_MATRIX2
      weights[b] = LEFT(t_s[b * kKeyTiles + n]);
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
        t_o[i] = coopMatMulAdd(weights[b], values, t_o[i]);
      }
    }
  }
}

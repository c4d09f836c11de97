// Inf and NaN of V, for matrix.comp. They never reach the matrix unit, where 0 times them would be
// NaN. What they do to o is noted at a split's end, row by row and column by column: 1 adds Inf,
// 2 -Inf, 3 NaN. The marks take K's place in shared memory, kMarksLine words a row, each row's of
// one thread's; two bits of a word's uints are a column's.
const uint kOddWords = kSplitLen / 32;
shared uint s_odd;  // 1 + the last split whose output is Inf or NaN somewhere
shared uint s_odd_keys[kOddWords];

// The signs of elements that are Inf or NaN: an exponent of ones is carried there.
uvec4 odd_signs(uvec4 word) {
#ifdef BFLOAT16
  return ((word & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
#else
  return ((word & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
#endif
}

// 0 takes the place of Inf and NaN.
uvec4 without_odd(uvec4 word) { return word & ~((odd_signs(word) >> 15) * 0xffffu); }

// Whether a row gives weight to a key; the row's m of the split is in s_ml. q.k is in float32: it
// decides only about weights that vanish.
bool has_weight(uint row, int key, uint64_t k) {
  const uint64_t q = params.q + state_index(t_group, t_first + row) * kHeadWords * 16;
  float product = 0.0;
  for (uint w = 0; w < kHeadWords; ++w) {
    const uvec4 a = load_words(q + 16 * w), b = load_words(k + 16 * w);
    product += dot(elements(a, 0), elements(b, 0)) + dot(elements(a, 1), elements(b, 1));
  }
  const float s = finish_score(product, row, key);
  return exp_nonpositive((kFinished ? s : s * params.scale) - base_of(s_ml[row].x)) != 0.0;
}

// Notes what rows take in from values of Inf or NaN of keys [begin, end).
void note_odd_values(uint64_t k, uint64_t v, int64_t k_pitch, int64_t v_pitch, int begin, int end) {
  for (uint i = t_id; i < kOddWords; i += kThreads) s_odd_keys[i] = 0;
  for (uint i = t_id; i < kRows * kMarksLine; i += kThreads) s_words[i] = uvec4(0);
  barrier();
  for (int key = begin + int(t_id); key < end; key += int(kThreads)) {
    uvec4 odd = uvec4(0);
    for (uint w = 0; w < kValueWords; ++w) {
      odd |= odd_signs(load_words(v + int64_t(key) * v_pitch + 16 * w));
    }
    const uint at = uint(key) % kSplitLen;
    if (odd != uvec4(0)) atomicOr(s_odd_keys[at / 32], 1u << (at % 32));
  }
  barrier();
  for (int key = begin; key < end; ++key) {
    const uint at = uint(key) % kSplitLen;
    if ((s_odd_keys[at / 32] >> (at % 32) & 1u) == 0) continue;
    for (uint row = t_id; row < kRows; row += kThreads) {
      if (t_first + row >= params.index_end) continue;
      if (!has_weight(row, key, k + int64_t(key) * k_pitch)) continue;
      for (uint w = 0; w < kValueWords; ++w) {
        const uvec4 word = load_words(v + int64_t(key) * v_pitch + 16 * w), odd = odd_signs(word);
        for (uint i = 0; i < 8; ++i) {
          const uint shift = i % 2 * 16, bits = word[i / 2] >> shift & 0xffffu;
          if ((odd[i / 2] >> shift & 0x8000u) == 0) continue;
          const uint infinity = kDType == 2 ? 0x7f80u : 0x7c00u;
          const uint what = (bits & 0x7fffu) != infinity ? 3u : 1u + (bits >> 15);
          s_words[row * kMarksLine + w / 8][w % 8 / 2] |= what << (2 * (w % 2 * 8 + i));
        }
      }
    }
  }
  barrier();
}
float marked(float o, uint row, uint column) {
  if (column >= kValueDim) return o;
  const uint marks = s_words[row * kMarksLine + column / 64][column % 64 / 16];
  const uint what = marks >> (2 * (column % 16)) & 3u;
  return what == 0 ? o : what == 1 ? o - hidden() : what == 2 ? o + hidden() : nan();
}

// Tiles of K, V and q for matrix.comp: from memory to registers, from there to shared memory.

// Where there is no key, behind the split's end or a cache's, the last one there is is loaded: its
// weight is 0 there, whatever stands in it. So no load stands behind a branch, which would have
// what is on its way moved from register to register.
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

// In the pass that `clean`s, 0 takes the place of Inf and NaN.
void store_values(bool clean) {
  [[unroll]] for (uint round = 0; round < kValueRounds; ++round) {
    const uint row = t_id / kValueLanes + round * kValueStep;
    if (kKeys % kValueStep != 0 && row >= kKeys) continue;
    [[unroll]] for (uint part = 0; part < kValueParts; ++part) {
      s_words[kValuesAt + row * kValueLine + t_id % kValueLanes + part * kValueLanes] =
          t_words[round * kValueParts + part];
    }
  }
  if (!clean) return;
  for (uint i = 0; i < kValueLoads; ++i) {  // it is rare: so the words are stored again
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

// q, to registers and to shared memory.
void load_queries() {
  if (kHeldSteps > 0) {
    [[dont_unroll]] for (uint first = 0; first < kRows; first += kQueryRows) {
      barrier();
      store_queries(first);
      barrier();
      [[unroll]] for (uint b = 0; b < kBlocks; ++b) {
        const uint row = t_row + b * kM;
        if (row < first || row >= first + kQueryRows) continue;
        [[unroll]] for (uint d = 0; d < kHeldSteps; ++d) {
          coopMatLoad(t_query[b * kHeldSteps + d], s_words, (row - first) * kHeadLine + d * kK / 8,
                      kHeadLine, gl_CooperativeMatrixLayoutRowMajor);
        }
      }
    }
  }
  if (kHeldSteps < kHeadSteps) store_aside();
}

// Partial states of four columns of a row: how two become one, and a row's end.
#pragma once

#include "results.cuh"
#include "units.cuh"

// Of four columns of a row.
struct Sum {
  float2 ml;
  float4 o;
};

KEYFOLD_INLINE void join(Sum& a, const Sum& later) {
  const float4 b = later.o;
  const float2 f = join_sums(a.ml, later.ml);
  a.o = {join_values(a.o.x, b.x, f.x, f.y), join_values(a.o.y, b.y, f.x, f.y),
         join_values(a.o.z, b.z, f.x, f.y), join_values(a.o.w, b.w, f.x, f.y)};
}

// Columns from `column` on of a row's result; `last`: and its logsumexp.
KEYFOLD_INLINE void write_result(const Params& p, const Ends& ends, u32 group, u32 index,
                                 u32 column, float2 ml, float4 o, bool last) {
  const u32 batch = group / p.kv_heads, kv_head = group % p.kv_heads;
  const u32 row = row_of(p, index), head = index - row * p.heads;
  const End end = end_of(ends, ml.x, ml.y, kv_head * p.heads + head);
  const u64 out = address_of(ends.out, batch, kv_head, head, row);
  write_results(ends, end, out, column, o);
  if (last) write_lse(ends, end, batch, kv_head, head, row);
}

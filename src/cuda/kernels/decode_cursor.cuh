// Where a block of decode_mma.cu is in the order of units, and which steps of keys a stream takes.
#pragma once

#include "decode_copies.cuh"

constexpr i32 kWarps = kStreams * kTeam;
static_assert(kThreads == 32 * kWarps, "as in kernel_shape.hpp");

// A place in the order of units: [group][unit of keys][tile of rows].
struct Cursor {
  u32 left;  // units of this block, with this one
  u32 group, batch, head;
  u32 tile;
  i32 unit;
  Range units;  // of the wave, that rows see
  Batch seen;
  i32 step, end;  // of this stream, in the unit
};

KEYFOLD_INLINE u32 num_tiles(const Params& p) {
  return (p.index_end - p.index_begin + kRows - 1) / kRows;
}
KEYFOLD_INLINE u32 tile_first(const Params& p, u32 tile) { return p.index_begin + tile * kRows; }
KEYFOLD_INLINE u32 tile_last(const Params& p, u32 tile) {
  return smaller(tile_first(p, tile) + kRows, p.index_end) - 1;
}
KEYFOLD_INLINE i32 unit_begin(const Params& p, i32 unit) {
  return i32(p.split * kSplitLen) + unit * kUnitLen;
}
KEYFOLD_INLINE i32 key_of(const Params& p, const Cursor& c, u32 stream, i32 step) {
  return unit_begin(p, c.unit) + (step * kStreams + i32(stream)) * kStep;
}

// Sets the unit's steps.
KEYFOLD_INLINE void enter(const Params& p, Cursor& c, u32 stream) {
  const i32 first = unit_begin(p, c.unit), skipped = kStreams - 1 - i32(stream);
  const i32 begin = larger(0, visible(c.seen, row_of(p, tile_first(p, c.tile))).begin - first);
  const i32 end = smaller(kUnitLen, visible(c.seen, row_of(p, tile_last(p, c.tile))).end - first);
  c.step = (begin / kStep + skipped) / kStreams;
  c.end = begin < end ? ((end + kStep - 1) / kStep + skipped) / kStreams : 0;
  c.end = larger(c.step, c.end);
}
KEYFOLD_INLINE void look_up(const Params& p, Cursor& c) {
  c.seen = load_batch(p, c.batch);
  c.units = units_of(p, c.seen);
}
KEYFOLD_INLINE void advance(const Params& p, Cursor& c, u32 stream) {
  if (--c.left == 0) return;
  if (++c.tile == num_tiles(p)) {
    c.tile = 0;
    if (++c.unit == c.units.end) {
      do {
        ++c.group;
        if (++c.head == p.kv_heads) {
          c.head = 0;
          ++c.batch;
          look_up(p, c);
        }
      } while (c.units.begin == c.units.end);
      c.unit = c.units.begin;
    }
  }
  enter(p, c, stream);
}

// Where this block comes to other queries; false where it never does.
KEYFOLD_INLINE bool next_turn(const Params& p, Cursor& c, u32 stream) {
  const u32 here = num_tiles(p) > 1 ? 1 : u32(c.units.end - c.unit);
  if (c.left <= here) return false;
  c.left -= here - 1;
  c.unit += i32(here) - 1;
  advance(p, c, stream);
  return true;
}

// Units of a batch entry.
KEYFOLD_INLINE u32 count_units(const Params& p, const Jobs& jobs, u32 batch) {
  const u32 begin = larger(p.group, batch * p.kv_heads);
  const u32 end = smaller(p.group + jobs.groups, (batch + 1) * p.kv_heads);
  if (begin >= end) return 0;
  const Range units = units_of(p, load_batch(p, batch));
  return (end - begin) * num_tiles(p) * u32(units.end - units.begin);
}
// This block's units: all blocks get the same number, or one more. Each lane looks at one of 32
// batch entries, unless all are alike.
KEYFOLD_INLINE Cursor begin_of(const Params& p, const Jobs& jobs, u32 stream, u32 lane) {
  Cursor c;
  const bool alike = p.batches == 0;
  const u32 first = alike ? 0 : p.group / p.kv_heads;
  const u32 last = alike ? 0 : (p.group + jobs.groups - 1) / p.kv_heads;
  u32 total = 0;
  if (alike) {
    const Range units = units_of(p, p.alike);
    total = jobs.groups * num_tiles(p) * u32(units.end - units.begin);
  } else {
    for (u32 batch = first; batch <= last; batch += 32) {
      u32 n = count_units(p, jobs, batch + lane);
      for (u32 i = 16; i > 0; i /= 2) n += __shfl_xor_sync(~0u, n, i);
      total += n;
    }
  }
  const u32 each = total / gridDim.x, more = total - each * gridDim.x;
  u32 at = each * blockIdx.x + smaller(blockIdx.x, more);
  c.left = each + (blockIdx.x < more ? 1 : 0);
  c.step = c.end = 0;
  if (c.left == 0) return c;
  for (u32 batch = first; !alike; batch += 32) {
    const u32 n = count_units(p, jobs, batch + lane);
    u32 sum = n;  // of the lanes up to this
    for (u32 i = 1; i < 32; i *= 2) {
      const u32 before = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += before;
    }
    const u32 here = __ballot_sync(~0u, sum > at);
    if (here == 0) {
      at -= __shfl_sync(~0u, sum, 31);
      continue;
    }
    const u32 i = __ffs(here) - 1;
    at -= __shfl_sync(~0u, sum - n, i);
    c.batch = batch + i;
    break;
  }
  if (alike) c.batch = 0;
  look_up(p, c);
  const u32 tiles = num_tiles(p), of_group = tiles * u32(c.units.end - c.units.begin);
  c.group = larger(p.group, c.batch * p.kv_heads) + at / of_group;
  if (alike) c.batch = c.group / p.kv_heads;
  c.head = c.group - c.batch * p.kv_heads;
  const u32 rest = at % of_group;
  c.unit = c.units.begin + i32(tiles == 1 ? rest : rest / tiles);
  c.tile = tiles == 1 ? 0 : rest % tiles;
  enter(p, c, stream);
  return c;
}

// How blocks share the jobs of a launch: first whole ones, in rounds, then the last, which are cut
// along the keys so that all blocks end at the same time.
//
// These stand in a line, by the tiles of keys that they see, of which each block takes as much as
// it needs to be level with the others, with a cut at either end. It begins with its last job,
// whose end another block will go on to when it comes to its own first one, at last: by then this
// block has most often been there. (McNaughton, 1959.) It waits only for blocks of lower numbers.
//
// Where blocks' rounds are very unequal, blocks would wait for each other. Then none are cut, and
// jobs of the last rows, which see the most keys if the mask looks like a triangle, begin.
#pragma once

#include "wgmma_jobs.cuh"

// A block's jobs of the line, `last` the last of them.
struct Share {
  bool even;  // whether there is a line
  u32 last, count;
  u32 skip;  // tiles of the first that the block in front takes
  u32 take;  // tiles of the last that this one takes; kAll: to its end
  u32 next;  // the block that goes on there
};
constexpr u32 kAll = ~0u;

// The block that has a place in the rounds: every second goes the other way, so that all get about
// the same work. And the other way round.
KEYFOLD_INLINE u32 turned(u32 round, u32 x) { return round % 2 ? gridDim.x - 1 - x : x; }

// What the threads in front of this one have, and all have.
struct Sum {
  u64 before, all;
};
KEYFOLD_INLINE Sum sum_of_threads(u64 x, u64* of_warps) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 sum = x;
#pragma unroll 1
  for (u32 step = 1; step < 32; step *= 2) {
    const u64 other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // all are done with the sum before
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  Sum result{sum - x, 0};
#pragma unroll 1
  for (u32 w = 0; w < kThreads / 32; ++w) {
    if (w < warp) result.before += of_warps[w];
    result.all += of_warps[w];
  }
  return result;
}

// Of jobs that all have the same length: so many tiles for each block.
KEYFOLD_INLINE Share share_of_equals(const Jobs& jobs, u32 whole) {
  const u64 length = jobs.length, line = jobs.cut * length;
  const u64 begin = line * blockIdx.x / gridDim.x, end = line * (blockIdx.x + 1) / gridDim.x;
  const u32 first = u32(begin / length), last = u32((end - 1) / length);
  const u32 skip = u32(begin - first * length), take = u32(end - last * length);
  return {true, whole + last, last - first + 1, skip, take == length ? kAll : take, blockIdx.x + 1};
}

// Of this block, found by all of its threads, of which there are no fewer than blocks. Who uses
// `shared` for something else waits for all of them first.
KEYFOLD_INLINE Share find_share(const Params& p, const Jobs& jobs, unsigned char* shared) {
  struct Common {
    u64 of_warps[kThreads / 32];
    u64 begin, end;
    Share share;
    u32 first;
    u32 works[kThreads];        // of each block in whole rounds
    u32 weights[3 * kThreads];  // of the line's jobs, of which there are less than three rounds
  };
  Common& common = *reinterpret_cast<Common*>(shared);
  const u32 all = number_of_jobs(p, jobs), whole = all - jobs.cut;
  if (jobs.length != 0) return share_of_equals(jobs, whole);
  common.works[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 1
  for (u32 at = threadIdx.x; at < all; at += kThreads) {
    Job job;
    job_at(p, jobs, at, job);
    // A job costs something at its begin and end, too, about as much as a tile.
    const u32 weight = u32(job.end - job.begin) + 1, round = at / gridDim.x;
    if (at < whole) {
      atomicAdd(&common.works[turned(round, at - round * gridDim.x)], weight);
    } else {
      common.weights[at - whole] = weight;
    }
  }
  __syncthreads();
  const u32 each = (jobs.cut + kThreads - 1) / kThreads;
  const u32 from = smaller(threadIdx.x * each, jobs.cut), to = smaller(from + each, jobs.cut);
  u64 weight = 0;
#pragma unroll 1
  for (u32 i = from; i < to; ++i) weight += common.weights[i];
  const u64 work = common.works[threadIdx.x];
  const Sum line = sum_of_threads(weight, common.of_warps);
  const Sum works = sum_of_threads(work, common.of_warps);
  const u64 level = (works.all + line.all + gridDim.x - 1) / gridDim.x;
  const u64 mean = works.all / gridDim.x;
  const bool odd = 2 * work > 3 * mean + 2 || 2 * work < mean || work > level;
  if (__syncthreads_or(threadIdx.x < gridDim.x && odd)) return {};
  const u64 room = threadIdx.x < gridDim.x ? level - work : 0;
  const Sum rooms = sum_of_threads(room, common.of_warps);
  const u64 begin = line.all * rooms.before / rooms.all;
  const u64 end = line.all * (rooms.before + room) / rooms.all;
  if (threadIdx.x == blockIdx.x) {
    common.begin = begin, common.end = end;
    common.share = {true, 0, 0, 0, kAll, 0};
  }
  __syncthreads();
  const u64 own_begin = common.begin, own_end = common.end;
  if (own_begin < own_end) {
    if (begin == own_end && begin < end) common.share.next = threadIdx.x;
    u64 at = line.before;
#pragma unroll 1
    for (u32 i = from; i < to; ++i) {
      const u64 behind = at + common.weights[i];
      if (at <= own_begin && own_begin < behind) {
        common.first = i;
        common.share.skip = u32(own_begin - at);
      }
      if (at < own_end && own_end <= behind) {
        common.share.last = whole + i;
        common.share.take = own_end == behind ? kAll : u32(own_end - at);
      }
      at = behind;
    }
  }
  __syncthreads();
  Share share = common.share;
  share.count = own_begin < own_end ? share.last - whole - common.first + 1 : 0;
  return share;
}

// Jobs in the order of a block.
struct Queue {
  Share share;
  u32 i = 0;
  // False behind the last. Where there is a line, and with splits side by side, one group comes
  // after the other, since their keys have to stay in the cache where blocks are not in step.
  // Else jobs of the last rows begin, and those of fewer rows come last.
  KEYFOLD_INLINE bool next(const Params& p, const Jobs& jobs, Job& job) {
    const bool even = kCuts && share.even;
    const u32 whole = number_of_jobs(p, jobs) - (even ? jobs.cut : 0);
    for (; i * gridDim.x < whole; ++i) {
      u32 at = i * gridDim.x + turned(i, blockIdx.x);
      if (at >= whole) continue;
      if (!kPartial && !even) {
        at = at % jobs.groups * jobs.tiles + jobs.tiles - 1 - at / jobs.groups;
      }
      if (job_at(p, jobs, at, job)) return ++i, true;
    }
    if (!even) return false;
    for (u32 n; (n = i - whole / gridDim.x) < share.count; ++i) {
      if (!job_at(p, jobs, share.last - n, job)) continue;
      const i32 begin = job.begin;
      if (n == 0 && share.take != kAll) job.to = share.next + 1, job.end = begin + i32(share.take);
      if (n + 1 == share.count && share.skip != 0) {
        job.from = blockIdx.x + 1;
        job.begin = begin + i32(share.skip);
      }
      return ++i, true;
    }
    return false;
  }
};

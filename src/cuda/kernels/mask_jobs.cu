// What jobs see of a mask, from its bits, in front of wgmma.cu: which tiles of keys, and how many.
// A block for each job, a warp for each of its splits, in turn with others.
#include "wgmma_jobs.cuh"

extern "C" __global__ void __launch_bounds__(kThreads)
    mask_jobs(const __grid_constant__ Params p, const __grid_constant__ Jobs jobs) {
  __shared__ u32 count;
  const u32 lane = threadIdx.x % 32;
  for (u32 at = blockIdx.x; at < number_of_jobs(p, jobs); at += gridDim.x) {
    Job job;
    whole_job_at(p, jobs, at, job);
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    // Rows that are none are as the last.
    u32 records[kRows / 32];
#pragma unroll
    for (u32 r = 0; r < kRows / 32; ++r) {
      const u32 index = job.first + smaller(32 * r + lane, 64 * job.units - 1);
      records[r] = u32(first_record(p, job.group, smaller(index, p.index_end - 1)));
    }
    for (u32 i = threadIdx.x / 32; i < splits_of_job(p); i += kThreads / 32) {
      const u32 split = kPartial ? job.split : i;  // of the wave
      u32 any[2] = {0, 0}, all[2] = {~0u, ~0u};
#pragma unroll
      for (u32 r = 0; r < kRows / 32; ++r) {
        const u64 record = u64(records[r] + split) * kRecordBytes;
        const u64 from = jobs.bits + kRecordsFrom + record + kOfTilesAt;
        const uint4 words = load_words(from);
        any[0] |= words.x, any[1] |= words.y, all[0] &= words.z, all[1] &= words.w;
      }
      const i32 first = i32(p.split + split) * kSplitTiles;
      const u32 begin = u32(clamped(job.begin - first, 0, 64));
      const u32 end = u32(clamped(job.end - first, i32(begin), 64));
      u32 seen = 0;
#pragma unroll
      for (u32 w = 0; w < 2; ++w) {
        any[w] = __reduce_or_sync(~0u, any[w]);
        all[w] = __reduce_and_sync(~0u, all[w]);
        const u32 last = u32(clamped(i32(end) - 32 * i32(w), 0, 32));
        any[w] &= ones(last) & ~ones(u32(clamped(i32(begin) - 32 * i32(w), 0, 32)));
        seen += u32(__popc(any[w]));
      }
      if (lane != 0) continue;
      const u64 sum = sum_of(p, jobs, at, i);
#pragma unroll
      for (u32 w = 0; w < 2; ++w) {
        write_word(sum + 4 * w, any[w]);
        write_word(sum + 8 + 4 * w, all[w]);
      }
      atomicAdd(&count, seen);
    }
    __syncthreads();
    if (threadIdx.x == 0) write_word(count_of(p, jobs, at), count);
  }
}

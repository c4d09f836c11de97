// A loop over all threads of an arena.
#pragma once

#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace keyfold::cpu {

/// Calls body(i) for each i of [begin, end), on `threads` threads of the arena that this one is in.
///
/// One task for each thread, sent to it: those that are handed on in halves and stolen reach the
/// last of many threads late. It begins with a share of its own, whose data of the loop before are
/// in its cache, and goes on with what the others have left; nobody waits for one that comes late.
template <class Body>
void loop(std::int64_t threads, std::int64_t begin, std::int64_t end, const Body& body) {
  constexpr std::int64_t kStepsPerThread = 8;  // of a loop that is long enough
  struct alignas(64) Share {
    std::atomic<std::int64_t> next;
    std::int64_t end;
  };
  const std::int64_t count = end - begin;
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (std::int64_t i = begin; i < end; ++i) body(i);
    return;
  }
  std::vector<Share> shares(static_cast<std::size_t>(threads));
  for (std::int64_t i = 0; i < threads; ++i) {
    Share& share = shares[static_cast<std::size_t>(i)];
    share.next = begin + count * i / threads;
    share.end = begin + count * (i + 1) / threads;
  }
  const std::int64_t step = std::max<std::int64_t>(1, count / (kStepsPerThread * threads));
  const auto work = [&](std::int64_t first) {
    for (std::int64_t i = 0; i < threads; ++i) {
      Share& share = shares[static_cast<std::size_t>((first + i) % threads)];
      for (;;) {
        const std::int64_t from = share.next.fetch_add(step, std::memory_order_relaxed);
        if (from >= share.end) break;
        for (std::int64_t at = from; at < std::min(share.end, from + step); ++at) body(at);
      }
    }
  };
  tbb::parallel_for(std::int64_t{0}, threads, work, tbb::static_partitioner());
}

}  // namespace keyfold::cpu

// Arenas that wait for the next run.
#include "cpu/arenas.hpp"

#include <algorithm>
#include <iterator>
#include <new>

namespace keyfold::cpu {

std::unique_ptr<tbb::task_arena> Arenas::take(int threads) {
  {
    const std::lock_guard lock(mutex_);
    const auto last = std::find_if(idle_.rbegin(), idle_.rend(), [&](const auto& arena) {
      return arena->max_concurrency() == threads;
    });
    if (last != idle_.rend()) {
      auto arena = std::move(*last);
      idle_.erase(std::next(last).base());
      return arena;
    }
  }
  return std::make_unique<tbb::task_arena>(threads);
}

void Arenas::give_back(std::unique_ptr<tbb::task_arena> arena) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    idle_.push_back(std::move(arena));
  } catch (const std::bad_alloc&) {
  }  // then it is not kept
}

Arenas& arenas() {
  // Never destroyed: a thread may still compute while the process exits.
  static auto& all = *new Arenas;
  return all;
}

}  // namespace keyfold::cpu

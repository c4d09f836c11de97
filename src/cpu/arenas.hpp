// Arenas of oneTBB threads, kept from one run for the next.
#pragma once

#include <tbb/task_arena.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace keyfold::cpu {

/// A new arena starts without threads: they come too late for a call of less than some 100 us. In
/// one that is used again they are still there, or soon. As many are kept as have worked at once.
class Arenas {
 public:
  /// Runs `work` in an arena of so many threads, which no other work uses meanwhile.
  template <class Work>
  void run(int threads, const Work& work) {
    struct Lease {
      explicit Lease(Arenas& from, int threads) : all(from), arena(all.take(threads)) {}
      ~Lease() { all.give_back(std::move(arena)); }
      Lease(const Lease&) = delete;
      Lease& operator=(const Lease&) = delete;
      Arenas& all;
      std::unique_ptr<tbb::task_arena> arena;
    };
    const Lease lease(*this, threads);
    lease.arena->execute(work);
  }

 private:
  std::unique_ptr<tbb::task_arena> take(int threads);
  void give_back(std::unique_ptr<tbb::task_arena> arena) noexcept;

  std::mutex mutex_;
  std::vector<std::unique_ptr<tbb::task_arena>> idle_;  // those used last at the end
};

/// The process's.
Arenas& arenas();

}  // namespace keyfold::cpu

// The loop over an arena's threads.
#include "cpu/loop.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <tbb/task_arena.h>

#include <stdexcept>

namespace keyfold::cpu {
namespace {

TEST(Loop, CallsEachOnceHoweverManyThreads) {
  for (const int threads : {1, 2, 3, 8}) {
    tbb::task_arena arena(2);  // as a rule fewer than the loop counts on
    for (const std::int64_t count : {0, 1, 2, 3, 7, 8, 63, 64, 65, 129, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
      arena.execute([&] {
        loop(threads, 5, 5 + count,
             [&](std::int64_t i) { ++calls[static_cast<std::size_t>(i - 5)]; });
      });
      EXPECT_THAT(calls, testing::Each(testing::Eq(1))) << count << " on " << threads;
    }
  }
}

TEST(Loop, PassesOnWhatItsBodyThrows) {
  tbb::task_arena arena(2);
  const auto fail = [](std::int64_t i) {
    if (i == 50) throw std::runtime_error("50");
  };
  EXPECT_THROW(arena.execute([&] { loop(2, 0, 100, fail); }), std::runtime_error);
}

}  // namespace
}  // namespace keyfold::cpu

// The pacer alone, and behind a queue of two dispatches, under steady and unsteady speeds.
#include "core/pace.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/random.hpp"

namespace keyfold::core {
namespace {

struct Speed {
  const char* name;
  double (*flops_per_second)(std::int64_t index, test::Rng& rng);
};

const Speed kSpeeds[] = {
    {"constant", [](std::int64_t, test::Rng&) { return 1e10; }},
    {"noisy", [](std::int64_t, test::Rng& rng) { return 1e10 * (0.8 + 0.4 * rng.uniform()); }},
    {"drifts down", [](std::int64_t i, test::Rng&) { return 1e10 * std::pow(0.97, double(i)); }},
    {"drifts up", [](std::int64_t i, test::Rng&) { return 1e9 * std::pow(1.05, double(i)); }},
    {"swings", [](std::int64_t i, test::Rng&) { return 1e10 * (1.5 + std::sin(0.3 * double(i))); }},
    {"spikes", [](std::int64_t, test::Rng& rng) { return rng.one_in(7) ? 5.5e9 : 1e10; }},
    {"rare fast spikes", [](std::int64_t, test::Rng& rng) { return rng.one_in(9) ? 9e10 : 1e10; }},
    {"drops to a tenth once", [](std::int64_t i, test::Rng&) { return i < 40 ? 1e10 : 1e9; }},
};

/// Device times of 200 dispatches; `in_flight` are queued before the first time is known.
std::vector<double> simulate(const Speed& speed, double budget, int in_flight,
                             std::vector<double>& speeds) {
  test::Rng rng(std::string("pacer ") + speed.name);
  Pacer pacer(budget, 1e6);
  std::vector<double> flops, seconds;
  for (std::int64_t i = 0; i < 200; ++i) {
    if (i >= in_flight) {
      const auto done = static_cast<std::size_t>(i - in_flight);
      pacer.record(flops[done], seconds[done]);
    }
    flops.push_back(pacer.next_flops());
    speeds.push_back(speed.flops_per_second(i, rng));
    seconds.push_back(flops.back() / speeds.back());
  }
  return seconds;
}

TEST(Pacer, StaysWithinHalfAboveTheBudgetUnlessTheSpeedHalves) {
  for (const Speed& speed : kSpeeds) {
    for (const int in_flight : {1, 2}) {
      for (const double budget : {0.001, 0.008, 0.1, 5.0}) {
        SCOPED_TRACE(std::string(speed.name) + ", budget " + std::to_string(budget));
        std::vector<double> speeds;
        const std::vector<double> seconds = simulate(speed, budget, in_flight, speeds);
        for (std::size_t i = 0; i < seconds.size(); ++i) {
          // The speeds that could be known when the dispatch was chosen.
          const std::size_t end = i >= static_cast<std::size_t>(in_flight) ? i - in_flight + 1 : 0;
          const std::size_t begin = end > 4 ? end - 4 : 0;
          if (begin == end) continue;
          const double slowest = *std::min_element(speeds.begin() + begin, speeds.begin() + end);
          EXPECT_TRUE(seconds[i] <= 1.5 * budget || speeds[i] < slowest / 2)
              << "dispatch " << i << " took " << seconds[i];
        }
      }
    }
  }
}

TEST(Pacer, SettlesNearTheBudget) {
  for (const int in_flight : {1, 2}) {
    std::vector<double> speeds;
    const std::vector<double> seconds = simulate(kSpeeds[0], 0.1, in_flight, speeds);
    for (std::size_t i = 50; i < seconds.size(); ++i) {
      EXPECT_GE(seconds[i], 0.05);
      EXPECT_LE(seconds[i], 0.1);
    }
  }
}

TEST(Pacer, BeginsSmallAndGrowsAtMostFourfold) {
  Pacer pacer(1.0, 1e3);
  double last = pacer.next_flops();
  EXPECT_EQ(last, 1e3);
  for (int i = 0; i < 12; ++i) {
    pacer.record(last, last / 1e15);  // far faster than any clock can tell
    EXPECT_LE(pacer.next_flops(), 4 * last);
    EXPECT_GT(pacer.next_flops(), last);
    last = pacer.next_flops();
  }
}

TEST(Pacer, RecoversAfterOneSlowDispatch) {
  Pacer pacer(0.1, 1e6);
  for (int i = 0; i < 20; ++i) pacer.record(pacer.next_flops(), pacer.next_flops() / 1e10);
  const double before = pacer.next_flops();
  pacer.record(before, before / 1e7);
  EXPECT_LT(pacer.next_flops(), before / 100);
  for (int i = 0; i < 20; ++i) pacer.record(pacer.next_flops(), pacer.next_flops() / 1e10);
  EXPECT_NEAR(pacer.next_flops(), before, before / 100);
}

TEST(Pacer, HalvesItsBudgetToASixtyFourth) {
  Pacer pacer(0.1, 1e6);
  double share = 1;
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(pacer.budget_share(), share);
    for (int j = 0; j < 20; ++j) pacer.record(pacer.next_flops(), pacer.next_flops() / 1e10);
    const double before = pacer.next_flops();
    EXPECT_NEAR(before, 0.75 * share * 0.1 * 1e10, 1);
    pacer.halve_budget();
    EXPECT_EQ(pacer.next_flops(), before / 2);
    share = std::max(share / 2, 1.0 / 64);
  }
}

TEST(Pacer, NoWorkSaysNothing) {
  Pacer pacer(0.1, 1e6);
  pacer.record(0, 1);
  EXPECT_EQ(pacer.next_flops(), 1e6);
}

TEST(Pacer, ATimeOfZeroIsNotBelieved) {
  Pacer pacer(0.1, 1e6);
  for (int i = 0; i < 200; ++i) pacer.record(pacer.next_flops(), 0);
  EXPECT_TRUE(std::isfinite(pacer.next_flops()));
}

TEST(Pacer, FirstDispatchFillsTheBudgetAtAKnownRate) {
  EXPECT_EQ(Pacer(0.1, 1e6, 0).next_flops(), 1e6);
  EXPECT_EQ(Pacer(0.1, 1e6, 1e5).next_flops(), 1e6);
  EXPECT_DOUBLE_EQ(Pacer(0.1, 1e6, 1e9).next_flops(), 0.075 * 1e9);
  EXPECT_DOUBLE_EQ(Pacer(0.008, 1e6, 1e9).next_flops(), 0.006 * 1e9);
}

}  // namespace
}  // namespace keyfold::core

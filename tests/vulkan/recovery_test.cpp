// Calls under a watchdog that ends long submissions, and under losses at chosen ones. Each test is
// a process of its own (ctest), as the layer is read when the first GPU is asked for.
#include <gtest/gtest.h>

#include <cmath>
#include <keyfold/device_memory.hpp>
#include <keyfold/state.hpp>

#include "support/backends.hpp"
#include "vulkan/watchdog/watch.hpp"

namespace keyfold::watchdog {
namespace {

using test::Call;
using test::Case;
using test::Inputs;
using test::Outputs;
using test::Rng;

constexpr double kLimitMs = 2000;  // as amdgpu and Windows have it
constexpr double kBudgetMs = 50;

class Recovery : public test::BackendTest {
 protected:
  void SetUp() override {}  // not before the watchdog is on

  /// Whether there is a GPU.
  static bool present() {
    for (const DeviceInfo& device : devices())
      if (device.backend == GetParam()) return true;
    return false;
  }

  static Case long_case() {
    return {.num_heads = 2,
            .num_kv_heads = 1,
            .q_len = 24,
            .kv_len = 6000,
            .head_dim = 32,
            .causal = true};
  }

  Outputs run_paced(const Call& call) const {
    RunOptions how;
    how.budget_ms = kBudgetMs;
    return run(call, how);
  }
  Outputs run_in_small_chunks(const Call& call) const {
    RunOptions how;
    how.chunk_size = 1;
    return run(call, how);
  }
};
// Named, not asked for: asking would make the instance before the watchdog is on.
INSTANTIATE_TEST_SUITE_P(On, Recovery, testing::Values("vulkan"),
                         [](const auto& backend) { return backend.param; });

#define KEYFOLD_NEEDS_A_GPU() \
  if (!present()) GTEST_SKIP() << GetParam() << " is ABSENT on this machine: nothing was tested"

int count(const Watch& watch, const std::string& end) {
  const std::vector<Watched> log = watch.log();
  return static_cast<int>(
      std::ranges::count_if(log, [&](const Watched& w) { return w.end == end; }));
}

TEST_P(Recovery, NoPacedSubmissionIsEnded) {
  const Watch watch({{"MS", std::to_string(kLimitMs)}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("paced");
  using Lengths = std::pair<std::int64_t, std::int64_t>;
  for (const auto& [q_len, kv_len] :
       {Lengths{1, 1 << 20}, Lengths{10, 1 << 18}, Lengths{40, 16'000}, Lengths{8192, 3000}}) {
    Case c = long_case();
    c.q_len = q_len;
    c.kv_len = kv_len;
    const Inputs inputs(c, rng);
    EXPECT_EQ(run_paced(inputs.call()).report.recoveries, 0);
  }
  EXPECT_EQ(count(watch, "LOST"), 0);
  EXPECT_GT(watch.log().size(), 4U);
  EXPECT_LT(watch.longest_ms(), kLimitMs);
}

TEST_P(Recovery, TheSameWorkAsOneSubmissionIsEnded) {
  const Watch watch({{"MS", "20"}});
  KEYFOLD_NEEDS_A_GPU();
  for (const DeviceInfo& device : devices())
    if (device.backend == GetParam() && device.type != "software GPU")
      GTEST_SKIP() << "a real GPU needs work of minutes on the CPU: see docs/benchmarks.md";
  Rng rng("one");
  Case c = long_case();
  c.q_len = 512;  // 1.2 GFLOP: far over the limit on any CPU
  c.kv_len = 9000;
  const Inputs inputs(c, rng);
  const Call call = inputs.call();
  const auto bytes = [](const TensorView& t) {
    return t.sizes[0] * t.sizes[1] * t.sizes[2] * t.sizes[3] * size_of(t.dtype);
  };
  DeviceBuffer k(GetParam(), bytes(call.k)), v(GetParam(), bytes(call.v));
  k.upload(0, call.k.data, bytes(call.k));
  v.upload(0, call.v.data, bytes(call.v));
  Call resident = call;
  resident.k.data = k.data();
  resident.v.data = v.data();
  RunOptions whole;
  whole.chunk_threshold = 1'000'000;
  try {
    run(resident, whole);
    ADD_FAILURE() << "expected an error";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kDeviceFailure) << e.what();
  }
  EXPECT_GT(count(watch, "LOST"), 0);
  // The process and the other backends go on.
  AttentionOptions options = call.options;
  options.run.backend = "cpu";
  Outputs got{test::Tensor(call.q.dtype, call.out_sizes()), test::Tensor(DType::kFloat32, {1}), {}};
  scaled_dot_product_attention(call.q, call.k, call.v, got.out.mutable_view(), options);
}

TEST_P(Recovery, LossesLeaveTheBits) {
  const Watch watch({{"LOSE_AT", "2,5,9"}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("losses");
  const Inputs inputs(long_case(), rng);
  const Outputs lossy = run_in_small_chunks(inputs.call());
  const Outputs whole = run(inputs.call());
  EXPECT_EQ(lossy.report.recoveries, 3);
  EXPECT_EQ(whole.report.recoveries, 0);
  EXPECT_TRUE(lossy.bytes() == whole.bytes());
  EXPECT_EQ(count(watch, "LOST"), 3);
}

TEST_P(Recovery, MemoryThatRunsOutInTheMiddleLeavesTheBits) {
  const Watch watch({{"OOM_AT", "3"}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("memory");
  const Inputs inputs(long_case(), rng);
  const Outputs lossy = run_in_small_chunks(inputs.call());
  EXPECT_EQ(lossy.report.recoveries, 1);
  EXPECT_TRUE(lossy.bytes() == run(inputs.call()).bytes());
}

TEST_P(Recovery, StatesOfBeforeAndAfterALossMerge) {
  constexpr std::uint64_t kLost = 40;
  const Watch watch({{"LOSE_AT", std::to_string(kLost)}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("merge");
  Case c = long_case();
  c.causal = false;
  c.kv_len = 4096;
  const Inputs inputs(c, rng);
  const Call call = inputs.call();
  const auto keys = [&](const TensorView& all, std::int64_t begin, std::int64_t end) {
    TensorView part = all;
    part.data =
        static_cast<const std::byte*>(all.data) + begin * all.strides[2] * size_of(all.dtype);
    part.sizes[2] = end - begin;
    return part;
  };
  AttentionOptions options = call.options;
  options.run.backend = GetParam();
  AttentionState before(call.q, options);
  before.update(keys(call.k, 0, 2048), keys(call.v, 0, 2048));
  ASSERT_LT(watch.log().size(), kLost);
  std::int64_t recoveries = 0;
  for (int i = 0; i < 100 && recoveries == 0; ++i) recoveries = run(call).report.recoveries;
  ASSERT_EQ(recoveries, 1);
  AttentionState after(call.q, options, 2048);
  after.update(keys(call.k, 2048, 4096), keys(call.v, 2048, 4096));
  before.merge(std::move(after));
  Outputs got{test::Tensor(call.q.dtype, call.out_sizes()),
              test::Tensor(DType::kFloat32, {1, c.num_heads, c.q_len, 1}),
              {}};
  got.out.poison();
  got.lse.poison();
  before.finish(got.out.mutable_view(), got.lse.mutable_view());
  expect_right(call, got, test::all_rows(call.q));
}

TEST_P(Recovery, LossesWithoutEndAreAnError) {
  const Watch watch({{"MS", "0.0001"}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("again");
  const Inputs inputs(long_case(), rng);
  try {
    run(inputs.call());
    ADD_FAILURE() << "expected an error";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kDeviceFailure);
    EXPECT_NE(std::string(e.what()).find("without progress"), std::string::npos) << e.what();
  }
}

TEST_P(Recovery, NoMemoryIsAnError) {
  const Watch watch({{"NO_MEMORY_OVER", "65536"}});
  KEYFOLD_NEEDS_A_GPU();
  Rng rng("none");
  const Inputs inputs(long_case(), rng);
  try {
    run(inputs.call());
    ADD_FAILURE() << "expected an error";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kOutOfMemory) << e.what();
  }
}

}  // namespace
}  // namespace keyfold::watchdog

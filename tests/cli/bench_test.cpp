// keyfold bench, the machine's ceilings, random tensors and the progress bar.
#include <pty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "ceilings.hpp"
#include "keyfold/plan.hpp"
#include "process.hpp"
#include "random_tensor.hpp"

namespace keyfold::cli::test {
namespace {

const std::vector<std::string> kSmall = {
    "bench",    "--heads", "4",          "--kv-heads", "2",      "--q-len", "8",
    "--kv-len", "1000",    "--head-dim", "32",         "--runs", "3",       "--no-ceilings"};

std::vector<std::string> small(const std::vector<std::string>& more) {
  std::vector<std::string> args = kSmall;
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

TEST(Bench, FiguresAgreeWithEachOther) {
  const TemporaryFolder folder;
  for (const char* dtype : {"float32", "float16", "bfloat16"}) {
    const Outcome outcome =
        run(small({"--dtype", dtype, "--causal", "--json", "--plot", folder / "bench.svg"}));
    ASSERT_EQ(outcome.code, kOk) << outcome.err;
    const nlohmann::json json = outcome.json();
    const double ms = json["median_ms"], pairs = 4 * (8 * 1000 - 28);
    EXPECT_EQ(json["times_ms"].size(), 3U);
    EXPECT_EQ(json["times_ms"][1], json["median_ms"]);
    EXPECT_LE(json["min_ms"], ms);
    EXPECT_GE(json["max_ms"], ms);
    EXPECT_NEAR(json["gflops"], 4 * 32 * pairs / ms * 1e-6, 1e-6);
    const double element = std::string(dtype) == "float32" ? 4 : 2;
    EXPECT_NEAR(json["kv_gbs"], 2 * 1000 * 64 * element / ms * 1e-6, 1e-6);
    EXPECT_EQ(json["dispatch_ms"].size(), 3U);
    EXPECT_EQ(json["dispatch_ms"][2].size(), json["last_run"]["dispatches"]);
    EXPECT_TRUE(json["machine"].is_null());
    EXPECT_THAT(load(folder / "bench.svg"), HasSubstr("budget 100 ms"));
  }
}

TEST(Bench, TextNamesWhatRan) {
  const Outcome outcome = run(small({"--threads", "1"}));
  EXPECT_EQ(outcome.code, kOk);
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("cpu, kernel"), HasSubstr(", 1 threads"),
                                 HasSubstr("median of 3 runs"), HasSubstr("GFLOP/s")));
}

TEST(Bench, TooLargeIsRefusedBeforeItIsAllocated) {
  const Outcome outcome = run({"bench", "--q-len", "1", "--kv-len", "1000G", "--budget-ms", "60000",
                               "--chunk-threshold", "2000G"});
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("GiB"), HasSubstr("are free")));
}

TEST(Bench, CeilingsAreMeasured) {
  int calls = 0;
  const Ceilings ceilings = measure_ceilings(1, [&] { ++calls; });
  EXPECT_GT(ceilings.fma_gflops, 0.01);
  EXPECT_GT(ceilings.read_gbs, 0.01);
  const std::vector<DeviceInfo> all = devices();
  const auto cpu = std::ranges::find(all, "cpu", &DeviceInfo::backend);
  ASSERT_NE(cpu, all.end());
  EXPECT_EQ(ceilings.bfloat16_gflops > 0.01, std::ranges::count(cpu->kernels, "avx512_bf16") == 1);
  EXPECT_GT(calls, 2);
  EXPECT_THROW(measure_ceilings(1, [] { throw std::runtime_error("stop"); }), std::runtime_error);
}

TEST(Bench, EachThreadRunsOnce) {
  std::atomic<int> sum = 0;
  EXPECT_GE(timed_on_threads(5, [&](int thread) { sum += 1 << (4 * thread); }), 0);
  EXPECT_EQ(sum, 0x11111);
}

TEST(Bench, RandomTensorsAreTheSameForAnyThreads) {
  const Dims sizes{1, 2, 300, 77};
  const RandomTensor one(DType::kFloat32, sizes, 7, 1, {}), three(DType::kFloat32, sizes, 7, 3, {}),
      other(DType::kFloat32, sizes, 8, 1, {});
  const auto floats = [](const RandomTensor& tensor) {
    return std::span(static_cast<const float*>(tensor.view().data), std::size_t{2} * 300 * 77);
  };
  EXPECT_TRUE(std::ranges::equal(floats(one), floats(three)));
  EXPECT_FALSE(std::ranges::equal(floats(one), floats(other)));
  double sum = 0;
  for (const float value : floats(one)) {
    EXPECT_GE(std::abs(value), 0.25F);
    EXPECT_LT(std::abs(value), 2.0F);
    sum += value;
  }
  EXPECT_NEAR(sum / (2 * 300 * 77), 0, 0.02);
}

// Runs the tool with a terminal as stderr and returns what came there.
std::string on_terminal(const std::vector<std::string>& args) {
  int terminal = -1, child_side = -1;
  if (::openpty(&terminal, &child_side, nullptr, nullptr, nullptr) != 0) return "no terminal";
  const TemporaryFolder folder;
  Process process(args, {}, folder / "out", ::ttyname(child_side));
  ::close(child_side);
  std::string text;
  char buffer[4096];
  for (ssize_t n = 0; (n = ::read(terminal, buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<std::size_t>(n));
  ::close(terminal);
  EXPECT_EQ(process.wait().code, kOk);
  return text;
}

// About three seconds of work on one thread, wherever that is.
std::vector<std::string> three_seconds() {
  const double ms = run(small({"--threads", "1", "--json"})).json()["median_ms"];
  std::vector<std::string> args = small({"--threads", "1"});
  args[12] = std::to_string(static_cast<int>(3000 / std::max(ms, 0.03)) + 3);
  return args;
}

TEST(Progress, ABarAppearsOnATerminalAndIsWiped) {
  const std::string text = on_terminal(three_seconds());
  EXPECT_THAT(text, AllOf(HasSubstr("bench ["), HasSubstr(" %, "), HasSubstr(" left")));
  EXPECT_TRUE(text.ends_with("\r\033[K")) << text;
}

TEST(Progress, NoBarForShortWorkOrWhenRefused) {
  EXPECT_THAT(on_terminal(small({})), IsEmpty());
  std::vector<std::string> args = three_seconds();
  args.push_back("--no-progress");
  EXPECT_THAT(on_terminal(args), IsEmpty());
}

}  // namespace
}  // namespace keyfold::cli::test

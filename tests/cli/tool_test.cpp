// The command line as a whole: help, exit codes, bad arguments, the environment, JSON, signals.
#include "tool.hpp"

#include "process.hpp"

namespace keyfold::cli::test {
namespace {

const char* const kCommands[] = {"attend", "needle", "plan", "bench", "devices", "store"};

TEST(Tool, HelpTeachesEveryCommand) {
  const Outcome all = run({"--help"});
  EXPECT_EQ(all.code, kOk);
  for (const char* command : kCommands) {
    EXPECT_THAT(all.out, HasSubstr(command));
    const Outcome help = run({command, "--help"});
    EXPECT_EQ(help.code, kOk);
    EXPECT_THAT(help.out, AllOf(HasSubstr("Example"), HasSubstr("--json"),
                                HasSubstr(std::string("keyfold ") + command)));
    EXPECT_THAT(help.err, IsEmpty());
  }
}

TEST(Tool, VersionIsPrinted) {
  const Outcome outcome = run({"--version"});
  EXPECT_EQ(outcome.code, kOk);
  EXPECT_THAT(outcome.out, ::testing::StartsWith("keyfold "));
}

TEST(Tool, WrongUseNamesTheArgumentAndTheHelp) {
  struct Case {
    std::vector<std::string> args;
    const char* named;
  };
  const Case cases[] = {
      {{}, "COMMAND is required"},
      {{"plann"}, "plann"},
      {{"plan", "--bogus"}, "--bogus"},
      {{"plan", "extra"}, "extra"},
      {{"plan", "--kv-len"}, "--kv-len"},
      {{"plan", "--kv-len", "abc"}, "--kv-len: expected a whole number of at least 0"},
      {{"plan", "--kv-len", "1", "--kv-len", "2"}, "--kv-len"},
      {{"plan", "--batch", "0"}, "--batch"},
      {{"plan", "--dtype", "float64"}, "--dtype"},
      {{"plan", "--budget-ms", "0"}, "--budget-ms: expected a number from 0.1 to 60000, got '0'"},
      {{"plan", "--budget-ms", "5", "--interactive"}, "--interactive"},
      {{"plan", "--chunk-size", "0"}, "--chunk-size"},
      {{"plan", "--threads", "1e99"}, "--threads"},
      {{"plan", "--max-scratch-mb", "-1"}, "--max-scratch-mb"},
      {{"plan", "--scale", "nan"}, "--scale"},
      {{"plan", "--softcap", "0"}, "--softcap"},
      {{"plan", "--window", "5"}, "--window: expected L,R, got '5'"},
      {{"plan", "--window", "5,-1"}, "--window"},
      {{"plan", "--kv-lens", "5,x"}, "--kv-lens"},
      {{"plan", "--heads", "3", "--kv-heads", "2"}, "num_heads"},
      {{"plan", "--batch", "2", "--kv-lens", "1"}, "kv_lens"},
      {{"plan", "--kv-len", "4", "--kv-lens", "5"}, "kv_lens"},
      {{"plan", "--backend", "none"}, "expected one of cpu"},
      {{"bench", "--runs", "0"}, "--runs"},
      {{"bench", "--warmup", "-1"}, "--warmup"},
      {{"attend"}, "--q"},
      {{"attend", "--q", "x", "--k", "x", "--kv", "x", "--out", "y"}, "--kv"},
      {{"store"}, "subcommand"},
      {{"store", "append", "x", "--k", "y"}, "--v"},
      {{"attend", "--q", "x", "--k", "x", "--v", "x"}, "--out"},
      {{"attend", "--q", "x", "--k", "x", "--v", "x", "--out", "y", "--layout", "z"}, "--layout"},
      {{"devices", "--json", "--all"}, "--all"},
  };
  for (const Case& c : cases) {
    const Outcome outcome = run(c.args);
    EXPECT_EQ(outcome.code, kUsage) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(c.named));
    EXPECT_THAT(outcome.err, ::testing::StartsWith("keyfold: "));
    EXPECT_THAT(outcome.out, IsEmpty());
  }
}

TEST(Tool, UnsupportedSaysWhatWouldWork) {
  const Outcome outcome = run({"plan", "--head-dim", "1000"});
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, HasSubstr("576"));
}

TEST(Tool, EnvironmentIsCheckedAndNamed) {
  for (const char* name : {"KEYFOLD_CHUNK_SIZE", "KEYFOLD_CHUNK_THRESHOLD", "KEYFOLD_BUDGET_MS",
                           "KEYFOLD_MAX_SCRATCH_MB", "KEYFOLD_BACKEND", "KEYFOLD_NUM_THREADS",
                           "MLX_SDPA_CHUNK_SIZE", "MLX_SDPA_CHUNK_THRESHOLD"})
    for (const char* value : {"0", "-1", "abc", "1e99", ""}) {
      const Outcome outcome = run({"plan", "--kv-len", "1024"}, {{name, value}});
      const bool valid = std::string(name).ends_with("THRESHOLD") && value == std::string("0");
      EXPECT_EQ(outcome.code, valid ? kOk : kUsage) << name << "=" << value << outcome.err;
      if (!valid) {
        EXPECT_THAT(outcome.err, AllOf(HasSubstr(name), HasSubstr(value)));
      }
    }
}

TEST(Tool, FlagsWinOverTheEnvironment) {
  const Outcome outcome =
      run({"plan", "--kv-len", "64K", "--budget-ms", "7", "--json"}, {{"KEYFOLD_BUDGET_MS", "50"}});
  EXPECT_EQ(outcome.json()["budget_ms"], 7.0);
  const Outcome from_environment =
      run({"plan", "--kv-len", "64K", "--json"}, {{"KEYFOLD_BUDGET_MS", "50"}});
  EXPECT_EQ(from_environment.json()["budget_ms"], 50.0);
  EXPECT_EQ(run({"plan", "--interactive", "--json"}).json()["budget_ms"], 8.0);
}

TEST(Tool, PlanCoversThePlane) {
  const Outcome outcome = run({"plan", "--heads", "4", "--kv-heads", "2", "--q-len", "300",
                               "--kv-len", "10000", "--chunk-size", "1", "--json"});
  ASSERT_EQ(outcome.code, kOk) << outcome.err;
  const nlohmann::json plan = outcome.json();
  std::int64_t pairs = 0;
  for (const auto& chunk : plan["chunks"]) {
    const auto size = [&](const char* axis) {
      return chunk[axis][1].get<std::int64_t>() - chunk[axis][0].get<std::int64_t>();
    };
    pairs += size("groups") * size("rows") * size("keys");
    EXPECT_LE(size("keys"), plan["split_len"]);
  }
  EXPECT_EQ(pairs, 2 * 300 * 10000);
  EXPECT_EQ(plan["shape"]["num_heads"], 4);
  EXPECT_EQ(plan["shape"]["value_dim"], 128);
}

TEST(Tool, PlanReadsWell) {
  const Outcome outcome = run({"plan", "--kv-len", "1M", "--causal", "--window", "4095,"});
  EXPECT_EQ(outcome.code, kOk);
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("1048576"), HasSubstr("causal, window 4095,"),
                                 HasSubstr("scratch"), HasSubstr("--json lists all")));
}

TEST(Tool, DevicesListTheDefaultFirst) {
  const nlohmann::json devices = run({"devices", "--json"}).json()["devices"];
  ASSERT_FALSE(devices.empty());
  EXPECT_EQ(devices[0]["backend"], "cpu");
  EXPECT_EQ(devices[0]["max_head_dim"], 576);
  EXPECT_EQ(devices[0]["type"], "cpu");
  for (const char* of_gpus : {"driver", "watchdog"}) EXPECT_EQ(devices[0][of_gpus], "") << of_gpus;
  for (const char* of_gpus : {"max_shared_bytes", "subgroup_size"})
    EXPECT_EQ(devices[0][of_gpus], 0) << of_gpus;
  const std::string text = run({"devices"}).out;
  EXPECT_THAT(text, AllOf(HasSubstr("cpu"), HasSubstr("type       cpu"), HasSubstr("bfloat16")));
  for (const nlohmann::json& device : devices) {
    // What a device does not have is not shown.
    if (!device["watchdog"].get<std::string>().empty()) {
      EXPECT_THAT(text, HasSubstr("watchdog   " + device["watchdog"].get<std::string>()));
    }
    if (!device["driver"].get<std::string>().empty()) {
      EXPECT_THAT(text, HasSubstr("driver     " + device["driver"].get<std::string>()));
    }
  }
  if (devices.size() == 1) {
    EXPECT_THAT(text, Not(AnyOf(HasSubstr("driver"), HasSubstr("watchdog"), HasSubstr("shared"),
                                HasSubstr("subgroup"))));
  }
}

TEST(Tool, DevicesWarmsWhatCompiles) {
  const nlohmann::json devices = run({"devices", "--json"}).json()["devices"];
  if (devices.size() > 1) GTEST_SKIP() << "its GPUs' kernels take minutes on a busy machine";
  const Outcome outcome = run({"devices", "--warm", "--json"});
  EXPECT_EQ(outcome.code, kOk);
  EXPECT_EQ(outcome.json()["devices"], devices);
  EXPECT_EQ(outcome.err, "");  // the CPU compiles nothing
}

TEST(Tool, FullStandardOutputIsAFailure) {
  // More than a buffer fails while it is printed, less than one when it is flushed.
  for (const std::vector<std::string>& args :
       {std::vector<std::string>{"plan", "--json"}, {"devices"}}) {
    const Outcome outcome = Process(args, {}, "/dev/full").wait();
    EXPECT_EQ(outcome.code, kFailure);
    EXPECT_THAT(outcome.err, HasSubstr("No space left on device"));
  }
}

TEST(Tool, PicturesAreWrittenOrAnErrorIs) {
  const TemporaryFolder folder;
  EXPECT_EQ(run({"plan", "--kv-len", "64K", "--plot", folder / "plan.svg"}).code, kOk);
  EXPECT_THAT(load(folder / "plan.svg"), HasSubstr("</svg>"));
  const Outcome outcome = run({"plan", "--plot", folder / "absent/plan.svg"});
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, HasSubstr("absent"));
  EXPECT_THAT(folder.names(), ::testing::ElementsAre("plan.svg"));
}

TEST(Tool, ParsesWithoutRunning) {
  Tool tool;
  tool.parse({"attend", "--q", "absent", "--k", "absent", "--v", "absent", "--out", "absent"});
  EXPECT_THROW(Tool().parse({"attend", "--help"}), CLI::CallForHelp);
  EXPECT_THROW(Tool().parse({"bench", "--kv-len", "1e99"}), CLI::ParseError);
}

}  // namespace
}  // namespace keyfold::cli::test

// Options over environment over defaults; every wrong value is an error that names its source.
#include "core/settings.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/scripted_backend.hpp"
#include "keyfold/plan.hpp"
#include "support/environment.hpp"

namespace keyfold::core {
namespace {

using test::ScopedEnv;

const char* const kVariables[] = {"KEYFOLD_BUDGET_MS",        "KEYFOLD_CHUNK_SIZE",
                                  "MLX_SDPA_CHUNK_SIZE",      "KEYFOLD_CHUNK_THRESHOLD",
                                  "MLX_SDPA_CHUNK_THRESHOLD", "KEYFOLD_MAX_SCRATCH_MB",
                                  "KEYFOLD_NUM_THREADS"};

/// None of the variables is set.
class SettingsTest : public testing::Test {
  ScopedEnv clear_[8] = {{kVariables[0], nullptr}, {kVariables[1], nullptr},
                         {kVariables[2], nullptr}, {kVariables[3], nullptr},
                         {kVariables[4], nullptr}, {kVariables[5], nullptr},
                         {kVariables[6], nullptr}, {"KEYFOLD_BACKEND", nullptr}};
};

void expect_error(const std::string& argument, const std::string& value,
                  const RunOptions& options) {
  SCOPED_TRACE(argument + " = '" + value + "'");
  try {
    resolve_settings(options);
    ADD_FAILURE() << "was accepted";
  } catch (const InvalidArgument& e) {
    const std::string message = static_cast<const Error&>(e).what();
    EXPECT_EQ(e.argument(), argument);
    EXPECT_NE(message.find(argument), std::string::npos) << message;
    EXPECT_NE(message.find("expected"), std::string::npos) << message;
    EXPECT_NE(message.find("from"), std::string::npos) << message;
    EXPECT_NE(message.find(value), std::string::npos) << message;
  }
}

TEST_F(SettingsTest, Defaults) {
  const Settings s = resolve_settings({});
  EXPECT_FALSE(s.backend);
  EXPECT_EQ(s.budget_seconds, 0.1);
  EXPECT_EQ(s.chunk_size, 0);
  EXPECT_EQ(s.chunk_threshold, 0);
  EXPECT_EQ(s.max_scratch_bytes, 256 << 20);
  EXPECT_GE(s.num_threads, 1);
}

TEST_F(SettingsTest, EnvironmentOverDefaultsOptionsOverEnvironment) {
  const int most_threads = resolve_settings({}).num_threads;  // that there are
  const ScopedEnv budget("KEYFOLD_BUDGET_MS", "12.5"), size("KEYFOLD_CHUNK_SIZE", "4096"),
      threshold("KEYFOLD_CHUNK_THRESHOLD", "0"), scratch("KEYFOLD_MAX_SCRATCH_MB", "3"),
      threads("KEYFOLD_NUM_THREADS", "1"), backend("KEYFOLD_BACKEND", "some");
  Settings s = resolve_settings({});
  EXPECT_EQ(s.backend, "some");
  EXPECT_EQ(s.budget_seconds, 0.0125);
  EXPECT_EQ(s.chunk_size, 4096);
  EXPECT_EQ(s.chunk_threshold, 0);
  EXPECT_EQ(s.max_scratch_bytes, 3 << 20);
  EXPECT_EQ(s.num_threads, 1);

  RunOptions options;
  options.backend = "other";
  options.budget_ms = 8;
  options.chunk_size = 1;
  options.chunk_threshold = 9;
  options.max_scratch_bytes = 1000;
  options.num_threads = 4096;
  s = resolve_settings(options);
  EXPECT_EQ(s.backend, "other");
  EXPECT_EQ(s.budget_seconds, 0.008);
  EXPECT_EQ(s.chunk_size, 1);
  EXPECT_EQ(s.chunk_threshold, 9);
  EXPECT_EQ(s.max_scratch_bytes, 1000);
  EXPECT_EQ(s.num_threads, most_threads);
}

TEST_F(SettingsTest, OlderNamesCountWhereTheNewOnesAreNotSet) {
  const ScopedEnv size("MLX_SDPA_CHUNK_SIZE", "100"), threshold("MLX_SDPA_CHUNK_THRESHOLD", "200");
  EXPECT_EQ(resolve_settings({}).chunk_size, 100);
  EXPECT_EQ(resolve_settings({}).chunk_threshold, 200);
  const ScopedEnv newer("KEYFOLD_CHUNK_SIZE", "300");
  EXPECT_EQ(resolve_settings({}).chunk_size, 300);
}

TEST_F(SettingsTest, WrongVariables) {
  const std::vector<std::string> never = {"-1",  "abc", "1e99", "",     " ",
                                          "1 ",  "nan", "inf",  "0x10", "99999999999999999999999",
                                          "1;2", "--"};
  for (const char* variable : kVariables) {
    std::vector<std::string> values = never;
    // 0 is a threshold, but no size, budget, memory or number of threads.
    if (std::string(variable).find("THRESHOLD") == std::string::npos) values.push_back("0");
    if (std::string(variable) != "KEYFOLD_BUDGET_MS") values.push_back("1.5");
    for (const std::string& value : values) {
      const ScopedEnv env(variable, value.c_str());
      expect_error(variable, value, {});
    }
  }
}

TEST_F(SettingsTest, AWrongVariableDoesNotMatterWhereTheOptionIsSet) {
  const ScopedEnv env("KEYFOLD_CHUNK_SIZE", "abc");
  RunOptions options;
  options.chunk_size = 5;
  EXPECT_EQ(resolve_settings(options).chunk_size, 5);
}

TEST_F(SettingsTest, WrongOptions) {
  const auto with = [](auto RunOptions::*field, auto value) {
    RunOptions options;
    options.*field = value;
    return options;
  };
  for (const double x : {0.0, -1.0, 0.09, 60001.0, std::nan(""), HUGE_VAL})
    expect_error("budget_ms", "", with(&RunOptions::budget_ms, x));
  for (const std::int64_t x :
       {std::int64_t{0}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()})
    expect_error("chunk_size", std::to_string(x), with(&RunOptions::chunk_size, x));
  for (const std::int64_t x : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()})
    expect_error("chunk_threshold", std::to_string(x), with(&RunOptions::chunk_threshold, x));
  for (const std::int64_t x :
       {std::int64_t{0}, std::int64_t{-1}, std::numeric_limits<std::int64_t>::min()})
    expect_error("max_scratch_bytes", std::to_string(x), with(&RunOptions::max_scratch_bytes, x));
  for (const int x : {0, -1, 4097})
    expect_error("num_threads", std::to_string(x), with(&RunOptions::num_threads, x));
}

TEST_F(SettingsTest, AnUnknownBackendIsNamedWithItsSourceAndTheChoices) {
  test::ScriptedBackend::fresh();
  for (const char* name : {"nonsense", ""}) {
    const ScopedEnv env("KEYFOLD_BACKEND", name);
    try {
      plan({.kv_len = 10});
      ADD_FAILURE() << "was accepted";
    } catch (const InvalidArgument& e) {
      const std::string message = static_cast<const Error&>(e).what();
      EXPECT_EQ(e.argument(), "KEYFOLD_BACKEND");
      EXPECT_NE(message.find("scripted"), std::string::npos) << message;
      EXPECT_NE(message.find("'" + std::string(name) + "'"), std::string::npos) << message;
    }
  }
  AttentionOptions options;
  options.run.backend = "nonsense";
  try {
    plan({.kv_len = 10}, options);
    ADD_FAILURE() << "was accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(e.argument(), "backend");
  }
}

TEST_F(SettingsTest, ABackendThatCannotSaysWhy) {
  test::ScriptedBackend::fresh();
  AttentionOptions options;
  options.run.backend = test::ScriptedBackend::kName;
  try {
    plan({.kv_len = 10, .head_dim = 300, .value_dim = 300}, options);
    ADD_FAILURE() << "was accepted";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(static_cast<const Error&>(e).what()).find("head_dim is more than 128"),
              std::string::npos);
  }
}

}  // namespace
}  // namespace keyfold::core

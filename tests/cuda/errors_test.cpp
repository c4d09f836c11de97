// What goes wrong on a GPU, on a fake driver. Each test is a process of its own (ctest), as the
// driver is opened once.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <keyfold/device_memory.hpp>
#include <keyfold/state.hpp>

#include "cuda/compiler.hpp"
#include "support/case.hpp"

namespace keyfold::cuda {
namespace {

using test::Inputs;
using test::Tensor;

/// On the fake driver, with these settings.
class Errors : public testing::Test {
 protected:
  static void open(const std::vector<std::pair<const char*, const char*>>& settings = {}) {
    setenv("KEYFOLD_CUDA_DRIVER", KEYFOLD_FAKE_DRIVER, 1);
    for (const auto& [name, value] : settings) setenv(name, value, 1);
  }

  /// A call on a backend; kernels compute nothing, so every row ends as if it saw no key.
  static Report call(const char* backend, std::int64_t chunk_size = 0) {
    test::Rng rng("errors");
    const Inputs inputs(
        {.num_heads = 2, .num_kv_heads = 1, .q_len = 24, .kv_len = 9000, .head_dim = 32}, rng);
    const test::Call call = inputs.call();
    Tensor out(call.q.dtype, call.out_sizes());
    out.poison();
    AttentionOptions options = call.options;
    options.run.backend = backend;
    if (chunk_size > 0) options.run.chunk_size = chunk_size;
    Report report =
        scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), options);
    if (std::string_view(backend) != "cpu") {
      EXPECT_EQ(out.at({0, 0, 0, 0}), 0.0F);
    }
    return report;
  }

  /// The message of the error that `body` ends with.
  template <class Body>
  static std::string error_of(ErrorCode code, const Body& body) {
    try {
      body();
    } catch (const RunError& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      return error.what();
    }
    ADD_FAILURE() << "expected an error";
    return {};
  }
  static void expect_in(const std::string& what, const char* part) {
    EXPECT_NE(what.find(part), std::string::npos) << what;
  }
};

TEST_F(Errors, NoneIsNone) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  std::vector<std::string> names;
  for (const DeviceInfo& device : devices()) names.push_back(device.backend);
  EXPECT_TRUE(std::ranges::find(names, "cuda") != names.end());
  EXPECT_TRUE(std::ranges::find(names, "cuda:1") != names.end());
  call("cuda");
  call("cuda:1", 1);
  DeviceBuffer buffer("cuda", 40 << 20);
  std::vector<char> there(40 << 20, 7), back(40 << 20);
  buffer.upload(0, there.data(), 40 << 20);
  buffer.download(0, back.data(), 40 << 20);
  EXPECT_TRUE(there == back);
}

TEST_F(Errors, AFaultIsNamedAndLasts) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_FAULT_AT", "5"}});
  expect_in(error_of(ErrorCode::kDeviceFailure, [] { call("cuda", 1); }),
            "CUDA_ERROR_ILLEGAL_ADDRESS");
  expect_in(error_of(ErrorCode::kDeviceFailure, [] { call("cuda"); }), "earlier in this process");
  call("cpu");
}

TEST_F(Errors, LittleMemoryIsEnoughForLess) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_MEMORY", "30000000"}});  // some less than the call would take
  EXPECT_LT(call("cuda").scratch_bytes, 30'000'000);
  EXPECT_LT(call("cuda").scratch_bytes, 30'000'000);  // again, beside what the pool has kept
}

TEST_F(Errors, KeysOnTheDeviceNeedNoRoomForThoseOfTheHost) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  test::Rng rng("resident keys");
  const Inputs inputs(
      {.num_heads = 16, .num_kv_heads = 16, .q_len = 1024, .kv_len = 64, .head_dim = 128}, rng);
  test::Call call = inputs.call();
  Tensor out(call.q.dtype, call.out_sizes());
  call.options.run.backend = "cuda";
  const auto run = [&] {
    return scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), call.options);
  };
  const test::Call on_host = call;
  const DeviceBuffer k("cuda", 1 << 20), v("cuda", 1 << 20);
  call.k.data = k.data();
  call.v.data = v.data();
  const std::int64_t bytes = run().scratch_bytes;
  call.options.run.max_scratch_bytes = bytes;
  EXPECT_EQ(run().staging_bytes, 0);  // one block of rows
  call = on_host;
  EXPECT_GT(run().scratch_bytes, bytes);
  call.options.run.max_scratch_bytes = bytes;
  EXPECT_GT(run().staging_bytes, 0);
}

TEST_F(Errors, NoMemoryIsAnError) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_MEMORY", "100000"}});
  expect_in(error_of(ErrorCode::kOutOfMemory, [] { call("cuda"); }), "CUDA_ERROR_OUT_OF_MEMORY");
  error_of(ErrorCode::kOutOfMemory, [] { DeviceBuffer("cuda", 1 << 20); });
  call("cpu");
}

TEST_F(Errors, AnOldDriverIsListedAndSaysSo) {
  open({{"KEYFOLD_FAKE_VERSION", "11080"}});
  for (const DeviceInfo& device : devices()) {
    if (device.backend == "cuda") expect_in(device.kernel, "11.8");
  }
  const std::string what = error_of(ErrorCode::kUnsupported, [] { call("cuda"); });
  expect_in(what, "11.8");
  expect_in(what, "update");
  error_of(ErrorCode::kUnsupported, [] { DeviceBuffer("cuda", 64); });
}

}  // namespace
}  // namespace keyfold::cuda

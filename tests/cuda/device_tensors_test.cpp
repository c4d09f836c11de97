// Calls on tensors of a CUDA device, on a fake driver: where their work goes, what is waited for,
// and what is refused. Each test is a process of its own (ctest), as the driver is opened once.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <keyfold/plan.hpp>
#include <keyfold/state.hpp>

#include "cuda/compiler.hpp"
#include "support/case.hpp"

namespace keyfold::cuda {
namespace {

using test::Inputs;
using test::Tensor;

constexpr keyfold::Device kDevice{DeviceType::kCuda, 0};
constexpr std::uintptr_t kStream = 4096;

TensorView there(TensorView view, keyfold::Device device = kDevice) {
  view.device = device;
  return view;
}

class DeviceTensors : public testing::Test {
 protected:
  static void open(const std::vector<std::pair<const char*, const char*>>& settings = {}) {
    setenv("KEYFOLD_CUDA_DRIVER", KEYFOLD_FAKE_DRIVER, 1);
    setenv("KEYFOLD_FAKE_STREAM", std::to_string(kStream).c_str(), 1);
    for (const auto& [name, value] : settings) setenv(name, value, 1);
  }

  static long count(const char* what) {
    void* const library = dlopen(KEYFOLD_FAKE_DRIVER, RTLD_NOW);
    const auto function =
        reinterpret_cast<long (*)(const char*)>(dlsym(library, "keyfold_fake_count"));
    return function(what);
  }

  explicit DeviceTensors(const test::Case& c = {.num_heads = 2,
                                                .num_kv_heads = 1,
                                                .q_len = 1,
                                                .kv_len = 9000,
                                                .head_dim = 32,
                                                .sinks = true})
      : rng_("device tensors"), inputs_(c, rng_), call_(inputs_.call()) {
    out_ = Tensor(call_.q.dtype, call_.out_sizes());
    for (TensorView* view : {&call_.q, &call_.k, &call_.v}) *view = there(*view);
    if (call_.options.sinks) call_.options.sinks = there(*call_.options.sinks);
    // NOLINTNEXTLINE(performance-no-int-to-ptr): any number does.
    call_.options.run.stream = reinterpret_cast<void*>(kStream);
  }

  Report run() {
    MutableTensorView out = out_.mutable_view();
    out.device = kDevice;
    return scaled_dot_product_attention(call_.q, call_.k, call_.v, out, call_.options);
  }
  /// The message of the InvalidArgument about this argument.
  std::string wrong(const std::string& argument) {
    try {
      run();
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.argument(), argument);
      return error.what();
    }
    ADD_FAILURE() << "expected an error";
    return {};
  }
  static void expect_in(const std::string& what, const char* part) {
    EXPECT_NE(what.find(part), std::string::npos) << what;
  }

  test::Rng rng_;
  Inputs inputs_;
  test::Call call_;
  Tensor out_;
};

TEST_F(DeviceTensors, OneDispatchIsNotWaitedFor) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  const Report report = run();
  EXPECT_EQ(report.backend, "cuda");
  EXPECT_EQ(report.dispatches, 1);
  EXPECT_EQ(report.longest_dispatch_ms, 0);
  EXPECT_EQ(count("launch"), 3);  // of q, keys, merge and result
  EXPECT_EQ(count("event"), 0);   // none asks for its time
  for (const char* what : {"launch", "stream allocation", "stream free"}) {
    EXPECT_GT(count(what), 0) << what;
    EXPECT_EQ(count(what), count((std::string(what) + " there").c_str())) << what;
  }
  EXPECT_EQ(count("copy"), 0);
  EXPECT_EQ(count("wait"), 0);
}

TEST_F(DeviceTensors, OfSeveralDispatchesTheLastIsNotWaitedFor) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  call_.options.run.chunk_size = 1;
  int progress = 0;
  call_.options.run.progress = [&](const Progress&) { ++progress; };
  const Report report = run();
  EXPECT_EQ(report.dispatches, 18);
  EXPECT_EQ(progress, 17);
  EXPECT_EQ(count("wait"), 17);
  EXPECT_EQ(count("flush there"), 18);  // each begins at once
  EXPECT_EQ(report.longest_dispatch_ms, 1);
}

TEST_F(DeviceTensors, WhileCapturingNothingIsWaitedForOrTimed) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_CAPTURE", "1"}});
  call_.options.run.chunk_size = 1;
  EXPECT_EQ(run().dispatches, 18);
  EXPECT_EQ(count("wait"), 0);
  EXPECT_EQ(count("event"), 0);
  EXPECT_EQ(count("flush"), 0);
  EXPECT_EQ(count("stream allocation"), 1);
}

TEST_F(DeviceTensors, FindTheirKernelsWhereTheyWereWarmed) {
  KEYFOLD_NEEDS_NVRTC();
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("keyfold_warm_" + std::to_string(getpid()));
  open({{"KEYFOLD_CACHE_DIR", folder.c_str()}});
  const auto kernels = [&] {
    return std::distance(std::filesystem::directory_iterator(folder), {});
  };
  AttentionShape shape{.num_heads = 2,
                       .num_kv_heads = 1,
                       .q_len = 1,
                       .kv_len = 9000,
                       .head_dim = 32,
                       .value_dim = 32};
  AttentionOptions options;
  options.run.backend = "cuda";
  warm(shape, options);
  const auto warmed = kernels();
  EXPECT_GT(warmed, 0);
  EXPECT_EQ(count("launch"), 0);
  run();
  const std::int32_t length = 77;
  call_.options.device_kv_lens = &length;
  run();
  EXPECT_GT(count("launch"), 0);
  EXPECT_EQ(kernels(), warmed);
  std::filesystem::remove_all(folder);
}

TEST_F(DeviceTensors, WhatIsCancelledIsWaitedFor) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  std::stop_source stop;
  call_.options.run.chunk_size = 1;
  call_.options.run.stop_token = stop.get_token();
  call_.options.run.progress = [&](const Progress&) { stop.request_stop(); };
  EXPECT_THROW(run(), Cancelled);
  EXPECT_EQ(count("wait"), 2);  // for a dispatch, and for the stream
  EXPECT_EQ(count("stream free"), 1);
}

TEST_F(DeviceTensors, UnalignedKeysAreGathered) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  const auto* const past = static_cast<const float*>(call_.k.data) + 1;
  call_.k.data = past;
  call_.k.sizes[2] = call_.v.sizes[2] = 8000;
  run();
  EXPECT_EQ(count("launch"), 6);  // of q, k, v, keys, merge, result
  EXPECT_EQ(count("stream allocation"), 2);
  EXPECT_EQ(count("copy"), 0);
}

TEST_F(DeviceTensors, LengthsMayBeThereToo) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  const std::int32_t length = 77;
  call_.options.device_kv_lens = &length;
  call_.options.window = {.left = 5, .right = 0};  // of which the host then knows nothing
  EXPECT_EQ(run().dispatches, 1);
  EXPECT_EQ(count("copy"), 0);
  const std::int64_t known = 77;
  call_.options.kv_lens = {&known, 1};
  expect_in(wrong("device_kv_lens"), "no kv_lens beside it");
}

TEST_F(DeviceTensors, AreAllOnOneDevice) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  const test::Call good = call_;
  call_.k.device = {};
  expect_in(wrong("k"), "expected memory on CUDA device 0, where q is, got host memory");
  call_ = good;
  call_.v.device.index = 1;
  expect_in(wrong("v"), "got memory on CUDA device 1");
  call_ = good;
  call_.options.sinks->device = {};
  wrong("sinks");
  call_ = good;
  call_.q.device = {};
  expect_in(wrong("k"), "expected host memory, got memory on CUDA device 0");
  call_ = good;
  for (TensorView* view : {&call_.q, &call_.k, &call_.v}) view->device = {};
  call_.options.sinks->device = {};
  expect_in(wrong("out"), "expected host memory, got memory on CUDA device 0");
}

TEST_F(DeviceTensors, ReachOnlyTheirDevice) {
  KEYFOLD_NEEDS_NVRTC();
  open();
  for (const char* backend : {"cpu", "cuda:1"}) {
    call_.options.run.backend = backend;
    try {
      run();
      ADD_FAILURE() << "expected an error";
    } catch (const RunError& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      expect_in(error.what(), "can't reach memory on CUDA device 0");
    }
  }
}

TEST_F(DeviceTensors, AreThereIndeed) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_OWNER", "1"}});
  expect_in(wrong("q"), "got an address on CUDA device 1");
  setenv("KEYFOLD_FAKE_OWNER", "0", 1);
  setenv("KEYFOLD_FAKE_UNKNOWN",
         std::to_string(reinterpret_cast<std::uintptr_t>(call_.v.data)).c_str(), 1);
  expect_in(wrong("v"), "that CUDA does not know");
}

TEST_F(DeviceTensors, NeedAStreamOfTheirContext) {
  KEYFOLD_NEEDS_NVRTC();
  open({{"KEYFOLD_FAKE_OTHER_CONTEXT", "1"}});
  expect_in(wrong("stream"), "another context");
}

TEST_F(DeviceTensors, AStreamNeedsThem) {
  open();
  Tensor q(DType::kFloat32, {1, 1, 1, 8}), out(DType::kFloat32, {1, 1, 1, 8});
  AttentionOptions options;
  options.run.stream = call_.options.run.stream;
  EXPECT_THROW(
      scaled_dot_product_attention(q.view(), q.view(), q.view(), out.mutable_view(), options),
      InvalidArgument);
}

TEST_F(DeviceTensors, AStateAndAMergeTakeTheHosts) {
  open();
  EXPECT_THROW(AttentionState(call_.q), InvalidArgument);
  MutableTensorView out = out_.mutable_view();
  out.device = kDevice;
  const Dims sizes{1, 2, 1, 1};
  Tensor lse(DType::kFloat32, sizes);
  EXPECT_THROW(merge_state(out, lse.mutable_view(), out, lse.view()), InvalidArgument);
}

}  // namespace
}  // namespace keyfold::cuda

// Statuses, messages, NULL arguments and tensors that must be refused.
#include <gtest/gtest.h>

#include <cstdio>
#include <functional>
#include <new>
#include <thread>

#include "c_api/guard.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

extern "C" int attend_to_one_key(void);

TEST(CApi, WorksFromC11) { EXPECT_EQ(attend_to_one_key(), KEYFOLD_OK) << keyfold_last_error(); }

TEST(CApi, NamesStatusesAndVersion) {
  EXPECT_STREQ(keyfold_status_name(KEYFOLD_OK), "ok");
  EXPECT_STREQ(keyfold_status_name(KEYFOLD_CANCELLED), "cancelled");
  EXPECT_STREQ(keyfold_status_name(static_cast<keyfold_status>(7)), "unknown status");
  int major = -1, minor = -1, patch = -1;
  EXPECT_EQ(std::sscanf(keyfold_version(), "%d.%d.%d", &major, &minor, &patch), 3);
}

TEST(CApi, EveryExceptionBecomesAStatus) {
  struct Case {
    std::function<void()> body;
    keyfold_status status;
    const char* message;
  };
  const Case cases[] = {
      {[] { throw InvalidArgument("q", "bad"); }, KEYFOLD_INVALID_ARGUMENT, "q: bad"},
      {[] { throw RunError(ErrorCode::kUnsupported, "no"); }, KEYFOLD_UNSUPPORTED, "no"},
      {[] { throw Cancelled("stopped", {}); }, KEYFOLD_CANCELLED, "stopped"},
      {[] { throw RunError(ErrorCode::kOutOfMemory, "full"); }, KEYFOLD_OUT_OF_MEMORY, "full"},
      {[] { throw RunError(ErrorCode::kDeviceFailure, "lost"); }, KEYFOLD_DEVICE_FAILURE, "lost"},
      {[] { throw RunError(ErrorCode::kInternal, "bug"); }, KEYFOLD_INTERNAL, "bug"},
      {[] { throw std::bad_alloc(); }, KEYFOLD_OUT_OF_MEMORY, "out of host memory"},
      {[] { throw std::runtime_error("odd"); }, KEYFOLD_INTERNAL, "odd"},
      {[] { throw 1; }, KEYFOLD_INTERNAL, "an exception that is not a std::exception"},
  };
  for (const Case& each : cases) {
    EXPECT_EQ(c_api::guarded(each.body), each.status);
    EXPECT_STREQ(keyfold_last_error(), each.message);
  }
  EXPECT_EQ(c_api::guarded([] {}), KEYFOLD_OK);
}

TEST(CApi, MessagesBelongToTheirThread) {
  ASSERT_EQ(keyfold_options_create(nullptr), KEYFOLD_INVALID_ARGUMENT);
  std::string before, after;
  std::thread([&] {
    before = keyfold_last_error();
    keyfold_plan_create(nullptr, nullptr, nullptr);
    after = keyfold_last_error();
  }).join();
  EXPECT_EQ(before, "");
  EXPECT_EQ(after.rfind("plan: ", 0), 0u) << after;
  EXPECT_TRUE(error_names("options")) << keyfold_last_error();
}

TEST(CApi, NullIsAnErrorThatNamesTheArgument) {
  Call call;
  const DLTensor q = call.q.dl(), k = call.k.dl(), v = call.v.dl(), out = call.out.dl(),
                 lse = call.lse.dl();
  keyfold_state* state = nullptr;
  ASSERT_EQ(keyfold_state_create(&q, nullptr, 0, &state), KEYFOLD_OK) << keyfold_last_error();
  std::int64_t next_key = 0;
  keyfold_shape shape = {};
  const keyfold_plan* plan = nullptr;
  const auto options = make_options();
  keyfold_options* const none = nullptr;
  const auto attend = keyfold_scaled_dot_product_attention;

  const auto expect = [](const char* argument, keyfold_status status) {
    EXPECT_EQ(status, KEYFOLD_INVALID_ARGUMENT) << argument;
    EXPECT_TRUE(error_names(argument)) << argument << " / " << keyfold_last_error();
  };
  expect("options", keyfold_options_create(nullptr));
  expect("q", attend(nullptr, &k, &v, &out, nullptr));
  expect("k", attend(&q, nullptr, &v, &out, nullptr));
  expect("v", attend(&q, &k, nullptr, &out, nullptr));
  expect("out", attend(&q, &k, &v, nullptr, nullptr));
  expect("out_a", keyfold_merge_state(nullptr, &lse, &out, &lse));
  expect("lse_a", keyfold_merge_state(&out, nullptr, &out, &lse));
  expect("out_b", keyfold_merge_state(&out, &lse, nullptr, &lse));
  expect("lse_b", keyfold_merge_state(&out, &lse, &out, nullptr));
  expect("q", keyfold_state_create(nullptr, nullptr, 0, &state));
  expect("state", keyfold_state_create(&q, nullptr, 0, nullptr));
  expect("state", keyfold_state_update(nullptr, &k, &v));
  expect("k", keyfold_state_update(state, nullptr, &v));
  expect("v", keyfold_state_update(state, &k, nullptr));
  expect("state", keyfold_state_merge(nullptr, state));
  expect("other", keyfold_state_merge(state, nullptr));
  expect("state", keyfold_state_finish(nullptr, &out, nullptr));
  expect("out", keyfold_state_finish(state, nullptr, nullptr));
  expect("state", keyfold_state_skip_to(nullptr, 0));
  expect("key", keyfold_state_skip_to(state, 1));
  expect("state", keyfold_state_save(nullptr, &lse, &lse, &out));
  expect("m", keyfold_state_save(state, nullptr, &lse, &out));
  expect("l", keyfold_state_save(state, &lse, nullptr, &out));
  expect("o", keyfold_state_save(state, &lse, &lse, nullptr));
  expect("state", keyfold_state_load(nullptr, &lse, &lse, &out, 2));
  expect("m", keyfold_state_load(state, nullptr, &lse, &out, 2));
  expect("l", keyfold_state_load(state, &lse, nullptr, &out, 2));
  expect("o", keyfold_state_load(state, &lse, &lse, nullptr, 2));
  expect("num_heads", keyfold_state_load(state, &lse, &lse, &out, 3));
  expect("state", keyfold_state_next_key(nullptr, &next_key));
  expect("next_key", keyfold_state_next_key(state, nullptr));
  expect("plan", keyfold_plan_create(&shape, nullptr, nullptr));
  expect("shape", keyfold_plan_create(nullptr, nullptr, &plan));
  expect("list", keyfold_device_list_create(nullptr));
  expect("token", keyfold_cancel_token_create(nullptr));
  expect("token", keyfold_cancel_token_request(nullptr));
  expect("backend", keyfold_options_set_backend(options.get(), nullptr));
  expect("kv_lens", keyfold_options_set_kv_lens(options.get(), nullptr, 2));
  expect("options", keyfold_options_set_scale(none, 1));
  expect("options", keyfold_options_set_mask(none, nullptr));
  expect("options", keyfold_options_set_progress(none, nullptr, nullptr));

  keyfold_state_destroy(state);
  keyfold_state_destroy(nullptr);
  keyfold_options_destroy(nullptr);
  keyfold_cancel_token_destroy(nullptr);
  keyfold_plan_destroy(nullptr);
  keyfold_device_list_destroy(nullptr);
}

TEST(CApi, BadTensorsAreRefused) {
  Call call;
  DLTensor q = call.q.dl();
  const DLTensor k = call.k.dl(), v = call.v.dl(), out = call.out.dl();
  const DLTensor good = q;
  std::vector<std::int64_t> shape(good.shape, good.shape + 4), strides = {480, 120, 40, 1};
  const Tensor untouched = call.out;
  const auto refused = [&](const char* expected) {
    EXPECT_EQ(keyfold_scaled_dot_product_attention(&q, &k, &v, &out, nullptr),
              KEYFOLD_INVALID_ARGUMENT);
    EXPECT_TRUE(error_names("q")) << keyfold_last_error();
    EXPECT_NE(std::string(keyfold_last_error()).find(expected), std::string::npos)
        << keyfold_last_error();
    EXPECT_TRUE(call.out == untouched);
    q = good;
  };

  q.device.device_type = kDLMetal;
  refused("expected device type kDLCPU (1) or kDLCUDA (2), got 8");
  q.dtype.lanes = 4;
  refused("expected dtype lanes 1, got 4");
  q.ndim = 3;
  refused("expected ndim 4, got 3");
  q.ndim = -1;
  refused("expected ndim 4, got -1");
  q.shape = nullptr;
  refused("expected a shape, got NULL");
  q.dtype = {kDLFloat, 64, 1};
  refused("code 2 of 64 bits");
  q.dtype = {kDLInt, 32, 1};
  refused("code 0 of 32 bits");
  q.dtype = {KEYFOLD_DL_BOOL, 8, 1};
  refused("bool");
  q.byte_offset = 2;
  refused("aligned to 4 bytes");
  q.data = nullptr;
  refused("null");
  q.strides = strides.data();
  strides[2] = -40;
  refused("-40");
  q.shape = shape.data();
  shape = {std::int64_t{1} << 40, 4, std::int64_t{1} << 40, 40};
  refused("overflows 64 bits");
  shape = {2, -4, 3, 40};
  q.shape = shape.data();
  refused("-4");
}

TEST(CApi, TensorsOnACudaDevice) {
  Call call;
  const auto options = make_options();
  DLTensor q = call.q.dl(), k = call.k.dl(), v = call.v.dl(), out = call.out.dl();
  const auto attend = [&] {
    return keyfold_scaled_dot_product_attention(&q, &k, &v, &out, options.get());
  };
  int stream = 0;
  EXPECT_EQ(keyfold_options_set_stream(options.get(), &stream), KEYFOLD_OK);
  EXPECT_EQ(attend(), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_TRUE(error_names("stream")) << keyfold_last_error();
  q.device = {kDLCUDA, 99};
  EXPECT_EQ(attend(), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_TRUE(error_names("k")) << keyfold_last_error();
  for (DLTensor* tensor : {&k, &v, &out}) tensor->device = {kDLCUDA, 99};
  EXPECT_EQ(attend(), KEYFOLD_UNSUPPORTED);
  EXPECT_NE(std::string(keyfold_last_error()).find("can't reach memory on CUDA device 99"),
            std::string::npos)
      << keyfold_last_error();
  for (DLTensor* tensor : {&q, &k, &v, &out}) tensor->device = {kDLCUDAHost, 0};
  EXPECT_EQ(keyfold_options_set_stream(options.get(), nullptr), KEYFOLD_OK);
  EXPECT_EQ(attend(), KEYFOLD_OK) << keyfold_last_error();
  const std::int32_t length = 1;
  EXPECT_EQ(keyfold_options_set_device_kv_lens(options.get(), &length), KEYFOLD_OK);
  EXPECT_EQ(attend(), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_TRUE(error_names("device_kv_lens")) << keyfold_last_error();
}

TEST(CApi, TheRanksOfLseAndSinks) {
  Call call;
  const auto options = make_options();
  DLTensor lse = call.lse.dl();
  for (const int ndim : {3, 4}) {
    lse.ndim = ndim;
    EXPECT_EQ(keyfold_options_set_lse(options.get(), &lse), KEYFOLD_OK) << keyfold_last_error();
  }
  lse.ndim = 1;
  EXPECT_EQ(keyfold_options_set_lse(options.get(), &lse), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_STREQ(keyfold_last_error(), "lse: expected ndim 4 or 3, got 1");
  lse.ndim = 3;
  EXPECT_EQ(keyfold_options_set_sinks(options.get(), &lse), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_STREQ(keyfold_last_error(), "sinks: expected ndim 4 or 1, got 3");
  EXPECT_EQ(keyfold_options_set_mask(options.get(), &lse), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_STREQ(keyfold_last_error(), "mask: expected ndim 4, got 3");
}

TEST(CApi, WhatNoBackendCanDoIsUnsupported) {
  Tensor wide({1, 1, 1, 100'000}), out({1, 1, 1, 100'000});
  const DLTensor wide_dl = wide.dl(), out_dl = out.dl();
  EXPECT_EQ(keyfold_scaled_dot_product_attention(&wide_dl, &wide_dl, &wide_dl, &out_dl, nullptr),
            KEYFOLD_UNSUPPORTED)
      << keyfold_last_error();
}

}  // namespace
}  // namespace keyfold::test

// Calls, states, merges, plans and devices: the C API gives what the C++ API gives.
#include <gtest/gtest.h>

#include <algorithm>
#include <future>
#include <thread>

#include "support.hpp"

namespace keyfold::test {
namespace {

// The smallest chunks there are, so that Call takes many dispatches.
auto many_dispatches() {
  auto options = make_options();
  keyfold_options_set_chunk_size(options.get(), 1);
  return options;
}

TEST(CApi, GivesTheBitsOfCppInEveryDtype) {
  for (const auto& [dtype, dl_dtype] : {std::pair{DType::kFloat16, DLDataType{kDLFloat, 16, 1}},
                                        std::pair{DType::kBFloat16, DLDataType{kDLBfloat, 16, 1}},
                                        std::pair{DType::kFloat32, DLDataType{kDLFloat, 32, 1}}}) {
    // 0x3000 to 0x3fff are finite in each dtype, and so are pairs of them as a float32.
    std::mt19937 rng(11);
    std::int64_t shape[] = {1, 2, 600, 16};
    std::vector<std::uint16_t> data(std::size_t{2} * 2 * 600 * 16), c(data.size()),
        cpp(data.size());
    for (auto& value : data) value = static_cast<std::uint16_t>(0x3000 + rng() % 0x1000);

    const DLTensor in = {data.data(), {kDLCPU, 0}, 4, dl_dtype, shape, nullptr, 0};
    DLTensor out = in;
    out.data = c.data();
    ASSERT_EQ(keyfold_scaled_dot_product_attention(&in, &in, &in, &out, nullptr), KEYFOLD_OK)
        << keyfold_last_error();
    const TensorView view(data.data(), dtype, {1, 2, 600, 16});
    scaled_dot_product_attention(view, view, view, {cpp.data(), dtype, view.sizes});
    EXPECT_EQ(c, cpp) << name_of(dtype);
  }
}

TEST(CApi, StridesAndByteOffsetAreHonoured) {
  Call expected, call;
  ASSERT_EQ(expected.attend(), KEYFOLD_OK) << keyfold_last_error();

  // k as [batch, len, heads, dim], behind 3 floats that do not belong to it.
  const std::int64_t heads = 2, dim = 40, len = Call::kKeys;
  std::vector<float> moved(call.k.values().size() + 3);
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t j = 0; j < len; ++j) {
        const float* row =
            &call.k.values()[static_cast<std::size_t>(((b * heads + h) * len + j) * dim)];
        std::copy(row, row + dim, moved.begin() + 3 + ((b * len + j) * heads + h) * dim);
      }
    }
  }
  std::int64_t strides[] = {len * heads * dim, dim, heads * dim, 1};
  DLTensor k = call.k.dl();
  k.data = moved.data();
  k.byte_offset = 3 * sizeof(float);
  k.strides = strides;
  const DLTensor q = call.q.dl(), v = call.v.dl(), out = call.out.dl();
  ASSERT_EQ(keyfold_scaled_dot_product_attention(&q, &k, &v, &out, nullptr), KEYFOLD_OK)
      << keyfold_last_error();
  EXPECT_TRUE(call.out == expected.out);
}

TEST(CApi, ReportsHowACallRan) {
  std::thread([] { EXPECT_EQ(keyfold_last_report(), nullptr); }).join();
  Call call;
  std::vector<keyfold_progress> seen;
  const auto options = many_dispatches();
  const auto note = [](const keyfold_progress* progress, void* user) {
    static_cast<std::vector<keyfold_progress>*>(user)->push_back(*progress);
    return 0;
  };
  keyfold_options_set_progress(options.get(), note, &seen);
  ASSERT_EQ(call.attend(options.get()), KEYFOLD_OK) << keyfold_last_error();
  const keyfold_report* report = keyfold_last_report();
  ASSERT_NE(report, nullptr);
  EXPECT_GT(report->dispatches, 1);
  EXPECT_EQ(report->dispatches, static_cast<std::int64_t>(seen.size()));
  EXPECT_EQ(seen.back().dispatches, report->dispatches);
  EXPECT_DOUBLE_EQ(seen.back().fraction, 1);
  EXPECT_EQ(seen.back().longest_dispatch_ms, report->longest_dispatch_ms);
  EXPECT_GE(report->elapsed_ms, report->longest_dispatch_ms);
  EXPECT_GT(report->scratch_bytes, 0);
  EXPECT_EQ(report->staging_bytes, 0);
  EXPECT_EQ(report->recoveries, 0);
  EXPECT_EQ(devices().front().backend, report->backend);
}

TEST(CApi, ACallbackCancels) {
  Call call;
  const Tensor out = call.out, lse = call.lse;
  const auto options = many_dispatches();
  const DLTensor lse_dl = call.lse.dl();
  keyfold_options_set_lse(options.get(), &lse_dl);
  const auto stop_at_two = [](const keyfold_progress* progress, void* user) {
    ++*static_cast<int*>(user);
    return progress->dispatches == 2 ? 42 : 0;
  };
  int calls = 0;
  keyfold_options_set_progress(options.get(), stop_at_two, &calls);
  EXPECT_EQ(call.attend(options.get()), KEYFOLD_CANCELLED);
  EXPECT_EQ(calls, 2);
  EXPECT_EQ(std::string(keyfold_last_error())
                .rfind("the progress callback returned 42 after 2 dispatches, at row 0, key ", 0),
            0u)
      << keyfold_last_error();
  EXPECT_TRUE(call.out == out);
  EXPECT_TRUE(call.lse == lse);
}

TEST(CApi, AnotherThreadCancels) {
  struct Meeting {
    std::promise<void> running, requested;
    bool met = false;
  } meeting;
  Call call;
  const Tensor out = call.out;
  keyfold_cancel_token* token = nullptr;
  ASSERT_EQ(keyfold_cancel_token_create(&token), KEYFOLD_OK);
  const auto options = many_dispatches();
  keyfold_options_set_cancel_token(options.get(), token);
  const auto wait_for_request = [](const keyfold_progress*, void* user) {
    auto& at = *static_cast<Meeting*>(user);
    if (!at.met) {
      at.met = true;
      at.running.set_value();
      at.requested.get_future().wait();
    }
    return 0;
  };
  keyfold_options_set_progress(options.get(), wait_for_request, &meeting);

  std::thread other([&] {
    meeting.running.get_future().wait();
    EXPECT_EQ(keyfold_cancel_token_request(token), KEYFOLD_OK);
    keyfold_cancel_token_destroy(token);  // the call keeps what it needs
    meeting.requested.set_value();
  });
  EXPECT_EQ(call.attend(options.get()), KEYFOLD_CANCELLED);
  other.join();
  EXPECT_NE(std::string(keyfold_last_error()).find("dispatches, at row 0, key "), std::string::npos)
      << keyfold_last_error();
  EXPECT_TRUE(call.out == out);
  EXPECT_EQ(call.attend(options.get()), KEYFOLD_CANCELLED) << "a request stays";
}

// Feeds keys [begin, end) of a call in pieces of the given size.
void feed(keyfold_state* state, Call& call, std::int64_t begin, std::int64_t end,
          std::int64_t piece) {
  for (std::int64_t at = begin; at < end; at += piece) {
    std::int64_t k_shape[] = {2, 2, std::min(piece, end - at), 40};
    std::int64_t v_shape[] = {2, 2, k_shape[2], 24};
    std::int64_t k_strides[] = {2 * Call::kKeys * 40, Call::kKeys * 40, 40, 1};
    std::int64_t v_strides[] = {2 * Call::kKeys * 24, Call::kKeys * 24, 24, 1};
    DLTensor k = call.k.dl(), v = call.v.dl();
    k.shape = k_shape, k.strides = k_strides, k.byte_offset = static_cast<std::uint64_t>(at) * 160;
    v.shape = v_shape, v.strides = v_strides, v.byte_offset = static_cast<std::uint64_t>(at) * 96;
    ASSERT_EQ(keyfold_state_update(state, &k, &v), KEYFOLD_OK) << keyfold_last_error();
  }
}

keyfold_state* make_state(Call& call, std::int64_t first_key = 0) {
  // Struct and options are gone when the state is used.
  const auto options = make_options();
  const std::int64_t kv_lens[] = {1000, 2100};
  keyfold_options_set_causal(options.get(), true);
  keyfold_options_set_kv_lens(options.get(), kv_lens, 2);
  keyfold_state* state = nullptr;
  const DLTensor q = call.q.dl();
  EXPECT_EQ(keyfold_state_create(&q, options.get(), first_key, &state), KEYFOLD_OK)
      << keyfold_last_error();
  return state;
}

// The same in one call.
void attend_at_once(Call& call) {
  const auto options = make_options();
  const std::int64_t kv_lens[] = {1000, 2100};
  const DLTensor lse = call.lse.dl();
  keyfold_options_set_causal(options.get(), true);
  keyfold_options_set_kv_lens(options.get(), kv_lens, 2);
  keyfold_options_set_lse(options.get(), &lse);
  ASSERT_EQ(call.attend(options.get()), KEYFOLD_OK) << keyfold_last_error();
}

TEST(CApiState, PiecesGiveTheBitsOfOneCall) {
  Call expected, call;
  attend_at_once(expected);
  keyfold_state* state = make_state(call);
  feed(state, call, 0, Call::kKeys, 37);
  std::int64_t next_key = 0;
  ASSERT_EQ(keyfold_state_next_key(state, &next_key), KEYFOLD_OK);
  EXPECT_EQ(next_key, Call::kKeys);
  const DLTensor out = call.out.dl(), lse = call.lse.dl();
  ASSERT_EQ(keyfold_state_finish(state, &out, &lse), KEYFOLD_OK) << keyfold_last_error();
  EXPECT_TRUE(call.out == expected.out);
  EXPECT_TRUE(call.lse == expected.lse);
  keyfold_state_destroy(state);
}

TEST(CApiState, MergeAddsTheOtherKeys) {
  Call expected, call;
  attend_at_once(expected);
  const std::int64_t middle = plan({2, 4, 2, 3, Call::kKeys, 40, 24, DType::kFloat32}).split_len;
  ASSERT_LT(middle, Call::kKeys) << "the test needs keys on both sides";
  keyfold_state* low = make_state(call);
  keyfold_state* high = make_state(call, middle);
  feed(low, call, 0, middle, 100);
  feed(high, call, middle, Call::kKeys, 100);
  ASSERT_EQ(keyfold_state_merge(low, high), KEYFOLD_OK) << keyfold_last_error();
  const DLTensor out = call.out.dl();
  ASSERT_EQ(keyfold_state_finish(low, &out, nullptr), KEYFOLD_OK) << keyfold_last_error();
  for (std::size_t i = 0; i < call.out.values().size(); ++i) {
    EXPECT_NEAR(call.out.values()[i], expected.out.values()[i], 1e-5);
  }
  keyfold_state_destroy(low);
  keyfold_state_destroy(high);
}

TEST(CApiState, GoesOnFromSavedNumbersElsewhere) {
  Call expected, call;
  attend_at_once(expected);
  const std::int64_t middle = plan({2, 4, 2, 3, Call::kKeys, 40, 24, DType::kFloat32}).split_len;
  keyfold_state* first = make_state(call);
  feed(first, call, 0, middle, 100);
  Tensor m({2, 4, 3, 1}), l({2, 4, 3, 1}), o({2, 4, 3, 24});
  DLTensor m_dl = m.dl(), l_dl = l.dl();
  const DLTensor o_dl = o.dl();
  m_dl.ndim = l_dl.ndim = 3;
  ASSERT_EQ(keyfold_state_save(first, &m_dl, &l_dl, &o_dl), KEYFOLD_OK) << keyfold_last_error();
  keyfold_state_destroy(first);

  keyfold_state* second = make_state(call);
  ASSERT_EQ(keyfold_state_skip_to(second, middle), KEYFOLD_OK) << keyfold_last_error();
  ASSERT_EQ(keyfold_state_load(second, &m_dl, &l_dl, &o_dl, 2), KEYFOLD_OK) << keyfold_last_error();
  feed(second, call, middle, Call::kKeys, 100);
  const DLTensor out = call.out.dl(), lse = call.lse.dl();
  ASSERT_EQ(keyfold_state_finish(second, &out, &lse), KEYFOLD_OK) << keyfold_last_error();
  EXPECT_TRUE(call.out == expected.out);
  EXPECT_TRUE(call.lse == expected.lse);
  keyfold_state_destroy(second);
}

TEST(CApi, MergeStateGivesTheBitsOfCpp) {
  Call a, b, cpp;
  const DLTensor out_a = a.out.dl(), out_b = b.out.dl(), lse_b = b.lse.dl();
  DLTensor lse_a = a.lse.dl();
  lse_a.ndim = 3;
  std::reverse(b.out.values().begin(), b.out.values().end());
  ASSERT_EQ(keyfold_merge_state(&out_a, &lse_a, &out_b, &lse_b), KEYFOLD_OK)
      << keyfold_last_error();
  merge_state(cpp.out.view(), cpp.lse.view(), b.out.view(), b.lse.view());
  EXPECT_TRUE(a.out == cpp.out);
  EXPECT_TRUE(a.lse == cpp.lse);
  EXPECT_FALSE(a.out == Call().out);
}

TEST(CApi, PlansAsCpp) {
  const auto options = many_dispatches();
  keyfold_shape shape = {sizeof(keyfold_shape), 2, 8, 2, 300, 20'000, 64, 48, {kDLBfloat, 16, 1}};
  const keyfold_plan* c = nullptr;
  ASSERT_EQ(keyfold_plan_create(&shape, options.get(), &c), KEYFOLD_OK) << keyfold_last_error();
  AttentionOptions cpp_options;
  cpp_options.run.chunk_size = 1;
  const Plan cpp = plan({2, 8, 2, 300, 20'000, 64, 48, DType::kBFloat16}, cpp_options);
  EXPECT_EQ(c->backend, cpp.backend);
  EXPECT_EQ(c->kernel, cpp.kernel);
  EXPECT_EQ(c->split_len, cpp.split_len);
  EXPECT_EQ(c->paced, cpp.paced);
  EXPECT_EQ(c->budget_ms, cpp.budget_ms);
  EXPECT_EQ(c->keys_per_chunk, cpp.keys_per_chunk);
  EXPECT_EQ(c->rows_per_chunk, cpp.rows_per_chunk);
  EXPECT_EQ(c->rows_per_block, cpp.rows_per_block);
  EXPECT_EQ(c->num_row_blocks, cpp.num_row_blocks);
  EXPECT_EQ(c->scratch_bytes, cpp.scratch_bytes);
  EXPECT_EQ(c->staging_bytes, cpp.staging_bytes);
  ASSERT_EQ(c->num_chunks, cpp.chunks.size());
  ASSERT_GT(c->num_chunks, 1u);
  for (std::size_t i = 0; i < cpp.chunks.size(); ++i) {
    const keyfold_chunk& from = c->chunks[i];
    const ChunkBox& box = cpp.chunks[i];
    EXPECT_TRUE(from.group_begin == box.group_begin && from.group_end == box.group_end &&
                from.row_begin == box.row_begin && from.row_end == box.row_end &&
                from.key_begin == box.key_begin && from.key_end == box.key_end)
        << "chunk " << i;
  }
  keyfold_plan_destroy(c);
}

TEST(CApi, PlanRefusesAWrongShape) {
  const keyfold_shape good = {sizeof(keyfold_shape), 1, 1, 1, 1, 1, 64, 64, {kDLFloat, 32, 1}};
  const keyfold_plan* plan = nullptr;
  const auto refused = [&](const keyfold_shape& shape, const char* argument) {
    EXPECT_EQ(keyfold_plan_create(&shape, nullptr, &plan), KEYFOLD_INVALID_ARGUMENT);
    EXPECT_TRUE(error_names(argument)) << keyfold_last_error();
    EXPECT_EQ(plan, nullptr);
  };
  keyfold_shape shape = good;
  shape.struct_size = 0;
  refused(shape, "shape");
  shape = good, shape.dtype.bits = 64;
  refused(shape, "shape");
  shape = good, shape.num_heads = 0;
  refused(shape, "num_heads");
}

TEST(CApi, ListsTheDevicesOfCpp) {
  const keyfold_device_list* list = nullptr;
  ASSERT_EQ(keyfold_device_list_create(&list), KEYFOLD_OK) << keyfold_last_error();
  const std::vector<DeviceInfo> cpp = devices();
  ASSERT_EQ(list->num_devices, cpp.size());
  for (std::size_t i = 0; i < cpp.size(); ++i) {
    const keyfold_device& c = *list->devices[i];
    EXPECT_EQ(c.backend, cpp[i].backend);
    EXPECT_EQ(c.name, cpp[i].name);
    EXPECT_EQ(c.kernel, cpp[i].kernel);
    EXPECT_EQ(c.num_threads, cpp[i].num_threads);
    EXPECT_EQ(c.memory_bytes, cpp[i].memory_bytes);
    EXPECT_EQ(c.max_head_dim, cpp[i].max_head_dim);
    EXPECT_EQ(c.type, cpp[i].type);
    EXPECT_EQ(c.driver, cpp[i].driver);
    EXPECT_EQ(c.watchdog, cpp[i].watchdog);
    EXPECT_EQ(c.max_shared_bytes, cpp[i].max_shared_bytes);
    EXPECT_EQ(c.subgroup_size, cpp[i].subgroup_size);
    EXPECT_EQ(std::vector<std::string>(c.kernels, c.kernels + c.num_kernels), cpp[i].kernels);
    ASSERT_EQ(c.num_dtypes, cpp[i].dtypes.size());
    ASSERT_GT(c.num_dtypes, 0u);
    for (std::size_t j = 0; j < c.num_dtypes; ++j) {
      const DLDataType& dtype = c.dtypes[j];
      EXPECT_EQ(dtype.code, cpp[i].dtypes[j] == DType::kBFloat16 ? kDLBfloat : kDLFloat);
      EXPECT_EQ(dtype.bits, 8 * size_of(cpp[i].dtypes[j]));
      EXPECT_EQ(dtype.lanes, 1);
    }
  }
  keyfold_device_list_destroy(list);
}

}  // namespace
}  // namespace keyfold::test

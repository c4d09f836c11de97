// Every option reaches the call: it changes the result as the C++ option does, or its bad value is
// refused by its name.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <functional>
#include <ostream>

#include "support.hpp"

namespace keyfold::test {
namespace {

struct FormulaCase {
  const char* name;
  std::function<keyfold_status(keyfold_options*)> set_c;
  std::function<void(AttentionOptions&)> set_cpp;

  friend std::ostream& operator<<(std::ostream& stream, const FormulaCase& self) {
    return stream << self.name;
  }
};

// Memory that the options below borrow, for the shapes of Call.
struct Borrowed {
  std::vector<std::uint8_t> visible = std::vector<std::uint8_t>(Call::kKeys);
  Tensor bias{{1, 1, 3, Call::kKeys}, 7}, sinks{{1, 4, 1, 1}, 8};
  std::array<std::int64_t, 4> visible_shape = {1, 1, 1, Call::kKeys};
  std::array<std::int64_t, 1> heads = {4};
  std::array<std::int64_t, 2> kv_lens = {1000, 2100};

  Borrowed() {
    for (std::size_t i = 0; i < visible.size(); ++i) visible[i] = i % 3 == 0;
  }
  DLTensor visible_dl(std::uint8_t code) {
    return {visible.data(), {kDLCPU, 0}, 4, {code, 8, 1}, visible_shape.data(), nullptr, 0};
  }
  DLTensor sinks_dl() {
    DLTensor dl = sinks.dl();
    dl.ndim = 1;
    dl.shape = heads.data();
    return dl;
  }
};

Borrowed& borrowed() {
  static Borrowed instance;
  return instance;
}

std::vector<FormulaCase> formula_cases() {
  const auto set_mask = [](std::uint8_t code) {
    return [code](keyfold_options* o) {
      const DLTensor mask = borrowed().visible_dl(code);
      return keyfold_options_set_mask(o, &mask);
    };
  };
  const auto bool_mask = [](AttentionOptions& o) {
    o.mask = TensorView(borrowed().visible.data(), DType::kBool, {1, 1, 1, Call::kKeys});
  };
  return {
      {"scale", [](auto* o) { return keyfold_options_set_scale(o, 0.7f); },
       [](auto& o) { o.scale = 0.7f; }},
      {"causal", [](auto* o) { return keyfold_options_set_causal(o, true); },
       [](auto& o) { o.causal = true; }},
      {"q_offset",
       [](auto* o) {
         keyfold_options_set_causal(o, true);
         return keyfold_options_set_q_offset(o, 100);
       },
       [](auto& o) { o.causal = true, o.q_offset = 100; }},
      {"window", [](auto* o) { return keyfold_options_set_window(o, 50, 0); },
       [](auto& o) {
         o.window = {50, 0};
       }},
      {"window_left", [](auto* o) { return keyfold_options_set_window(o, 50, KEYFOLD_UNBOUNDED); },
       [](auto& o) {
         o.window = {50, std::nullopt};
       }},
      {"window_right",
       [](auto* o) {
         keyfold_options_set_q_offset(o, 9);
         return keyfold_options_set_window(o, KEYFOLD_UNBOUNDED, 2);
       },
       [](auto& o) {
         o.q_offset = 9, o.window = {std::nullopt, 2};
       }},
      {"softcap", [](auto* o) { return keyfold_options_set_softcap(o, 0.1f); },
       [](auto& o) { o.softcap = 0.1f; }},
      {"mask_bool", set_mask(KEYFOLD_DL_BOOL), bool_mask},
      {"mask_uint8", set_mask(kDLUInt), bool_mask},
      {"mask_additive",
       [](auto* o) {
         const DLTensor mask = borrowed().bias.dl();
         return keyfold_options_set_mask(o, &mask);
       },
       [](auto& o) { o.mask = borrowed().bias.view(); }},
      {"sinks",
       [](auto* o) {
         const DLTensor sinks = borrowed().sinks_dl();
         return keyfold_options_set_sinks(o, &sinks);
       },
       [](auto& o) { o.sinks = borrowed().sinks.view(); }},
      {"kv_lens",
       [](auto* o) {
         return keyfold_options_set_kv_lens(o, borrowed().kv_lens.data(),
                                            borrowed().kv_lens.size());
       },
       [](auto& o) { o.kv_lens = borrowed().kv_lens; }},
  };
}

class FormulaOption : public testing::TestWithParam<FormulaCase> {};

TEST_P(FormulaOption, GivesTheBitsOfCpp) {
  Call plain, c, cpp;
  ASSERT_EQ(plain.attend(), KEYFOLD_OK) << keyfold_last_error();

  const auto options = make_options();
  DLTensor lse = c.lse.dl();
  lse.ndim = 3;
  ASSERT_EQ(keyfold_options_set_lse(options.get(), &lse), KEYFOLD_OK);
  ASSERT_EQ(GetParam().set_c(options.get()), KEYFOLD_OK) << keyfold_last_error();
  ASSERT_EQ(c.attend(options.get()), KEYFOLD_OK) << keyfold_last_error();

  AttentionOptions cpp_options;
  cpp_options.lse = cpp.lse.view();
  GetParam().set_cpp(cpp_options);
  scaled_dot_product_attention(cpp.q.view(), cpp.k.view(), cpp.v.view(), cpp.out.view(),
                               cpp_options);
  EXPECT_TRUE(c.out == cpp.out);
  EXPECT_TRUE(c.lse == cpp.lse);
  EXPECT_FALSE(c.out == plain.out) << "the option changed nothing";
}

INSTANTIATE_TEST_SUITE_P(CApi, FormulaOption, testing::ValuesIn(formula_cases()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(CApiOptions, BadValuesAreRefusedByName) {
  using Set = std::function<keyfold_status(keyfold_options*)>;
  const std::int64_t kv_lens[] = {1};
  const std::pair<const char*, Set> cases[] = {
      {"scale", [](auto* o) { return keyfold_options_set_scale(o, NAN); }},
      {"window.left", [](auto* o) { return keyfold_options_set_window(o, -2, 0); }},
      {"window.right", [](auto* o) { return keyfold_options_set_window(o, 0, -2); }},
      {"softcap", [](auto* o) { return keyfold_options_set_softcap(o, 0); }},
      {"kv_lens", [&](auto* o) { return keyfold_options_set_kv_lens(o, kv_lens, 1); }},
      {"backend", [](auto* o) { return keyfold_options_set_backend(o, "abacus"); }},
      {"budget_ms", [](auto* o) { return keyfold_options_set_budget_ms(o, -1); }},
      {"chunk_size", [](auto* o) { return keyfold_options_set_chunk_size(o, 0); }},
      {"chunk_threshold", [](auto* o) { return keyfold_options_set_chunk_threshold(o, -1); }},
      {"max_scratch_bytes", [](auto* o) { return keyfold_options_set_max_scratch_bytes(o, -1); }},
      {"num_threads", [](auto* o) { return keyfold_options_set_num_threads(o, 0); }},
  };
  for (const auto& [name, set] : cases) {
    Call call;
    const Tensor untouched = call.out;
    const auto options = make_options();
    ASSERT_EQ(set(options.get()), KEYFOLD_OK) << name << ": values are checked by the call";
    EXPECT_EQ(call.attend(options.get()), KEYFOLD_INVALID_ARGUMENT) << name;
    EXPECT_TRUE(error_names(name)) << name << " / " << keyfold_last_error();
    EXPECT_TRUE(call.out == untouched) << name;
  }
}

TEST(CApiOptions, AFailedSetterChangesNothing) {
  Call masked, call;
  const auto options = make_options();
  DLTensor mask = borrowed().visible_dl(KEYFOLD_DL_BOOL);
  ASSERT_EQ(keyfold_options_set_mask(options.get(), &mask), KEYFOLD_OK);
  ASSERT_EQ(masked.attend(options.get()), KEYFOLD_OK) << keyfold_last_error();
  mask.dtype.lanes = 2;
  ASSERT_EQ(keyfold_options_set_mask(options.get(), &mask), KEYFOLD_INVALID_ARGUMENT);
  ASSERT_EQ(call.attend(options.get()), KEYFOLD_OK) << keyfold_last_error();
  EXPECT_TRUE(call.out == masked.out);
}

TEST(CApiOptions, NullRemovesWhatWasSet) {
  Call plain, call;
  ASSERT_EQ(plain.attend(), KEYFOLD_OK) << keyfold_last_error();
  const auto options = make_options();
  keyfold_options* o = options.get();
  const DLTensor mask = borrowed().visible_dl(kDLUInt), sinks = borrowed().sinks_dl(),
                 lse = call.lse.dl();
  keyfold_cancel_token* token = nullptr;
  ASSERT_EQ(keyfold_cancel_token_create(&token), KEYFOLD_OK);
  keyfold_cancel_token_request(token);
  const auto cancel = [](const keyfold_progress*, void*) { return 1; };
  keyfold_options_set_mask(o, &mask), keyfold_options_set_mask(o, nullptr);
  keyfold_options_set_sinks(o, &sinks), keyfold_options_set_sinks(o, nullptr);
  keyfold_options_set_lse(o, &lse), keyfold_options_set_lse(o, nullptr);
  keyfold_options_set_kv_lens(o, borrowed().kv_lens.data(), 2);
  keyfold_options_set_kv_lens(o, nullptr, 0);
  keyfold_options_set_progress(o, cancel, nullptr);
  keyfold_options_set_progress(o, nullptr, nullptr);
  keyfold_options_set_cancel_token(o, token), keyfold_options_set_cancel_token(o, nullptr);
  EXPECT_EQ(call.attend(o), KEYFOLD_OK) << keyfold_last_error();
  EXPECT_TRUE(call.out == plain.out);
  EXPECT_TRUE(call.lse == Call().lse);
  keyfold_cancel_token_destroy(token);
}

}  // namespace
}  // namespace keyfold::test

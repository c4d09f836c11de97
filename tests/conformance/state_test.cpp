// AttentionState: keys cut anywhere give the bits of one call; merging; misuse.
#include <algorithm>
#include <cmath>
#include <functional>

#include "conformance/state_fixture.hpp"

namespace keyfold::test {
namespace {

class State : public StateTest {};
KEYFOLD_FOR_EACH_BACKEND(State);

TEST_P(State, KeysCutAnywhereGiveTheSameBits) {
  Rng rng("cuts");
  for (int n = 0; n < by_scale(8, 60, 250) && !HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = 2,
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 30),
           .kv_len = rng.between(0, 3000),
           .head_dim = rng.pick<std::int64_t>({7, 32})};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(3)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(3)) c.mask = Mask::kAdditive;
    c.sinks = rng.one_in(2);
    if (rng.one_in(3))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    c.layout = rng.pick<Layout>({Layout::kDense, Layout::kTransposed, Layout::kSliced});
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = positioned(inputs.call());
    const std::vector<std::byte> expected = run(call).bytes();

    AttentionState state(call.q, options_of(call));
    const std::int64_t most = rng.pick<std::int64_t>({1000, 600, 100});
    std::int64_t fed = 0;
    while (fed < c.kv_len) {
      const std::int64_t end = std::min(c.kv_len, fed + rng.between(0, most));
      feed(state, call, fed, end);
      fed = end;
      EXPECT_EQ(state.next_key(), fed);
    }
    if (fed == 0) feed(state, call, 0, 0);
    const Outputs got = finish(state, call, c.layout);
    EXPECT_TRUE(got.bytes() == expected);
    EXPECT_TRUE(got.out.only_elements_written());
  }
}

TEST_P(State, OneKeyAtATime) {
  Rng rng("one by one");
  const Inputs inputs({.q_len = 3, .kv_len = by_scale(70, 600, 1100), .head_dim = 16}, rng);
  const Call call = inputs.call();
  AttentionState state(call.q, options_of(call));
  for (std::int64_t j = 0; j < inputs.c.kv_len; ++j) feed(state, call, j, j + 1);
  EXPECT_TRUE(finish(state, call).bytes() == run(call).bytes());
}

TEST_P(State, KeysNeedToLiveOnlyDuringUpdate) {
  Rng rng("lifetime");
  const Inputs inputs({.q_len = 3, .kv_len = 1000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  AttentionState state(call.q, options_of(call));
  for (std::int64_t begin = 0; begin < 1000; begin += 100) {
    Tensor k(DType::kFloat32, {1, 1, 100, 16}), v(DType::kFloat32, {1, 1, 100, 16});
    k.each([&](const Dims& i) { k.set(i, inputs.k.at({0, 0, begin + i[2], i[3]})); });
    v.each([&](const Dims& i) { v.set(i, inputs.v.at({0, 0, begin + i[2], i[3]})); });
    state.update(k.view(), v.view());
    k.poison();
    v.poison();
  }
  EXPECT_TRUE(finish(state, call).bytes() == run(call).bytes());
}

TEST_P(State, NoKeyAtAll) {
  Rng rng("none");
  for (const bool sinks : {false, true}) {
    const Mask mask = sinks ? Mask::kBool : Mask::kNone;  // one over no key
    const Inputs inputs({.q_len = 3, .kv_len = 0, .head_dim = 16, .mask = mask, .sinks = sinks},
                        rng);
    const Call call = inputs.call();
    AttentionState state(call.q, options_of(call));
    EXPECT_TRUE(finish(state, call).bytes() == run(call).bytes());
  }
}

TEST_P(State, BeginsAnewAfterFinish) {
  Rng rng("anew");
  const Inputs inputs({.q_len = 3, .kv_len = 700, .head_dim = 16}, rng);
  const Call call = inputs.call();
  AttentionState state(call.q, options_of(call));
  feed(state, call, 0, 700);
  const Outputs first = finish(state, call);
  const Outputs second = finish(state, call);  // now it has seen nothing
  second.out.each([&](const Dims& i) { EXPECT_EQ(second.out.at(i), 0); });
  second.lse.each([&](const Dims& i) { EXPECT_EQ(second.lse.at(i), -INFINITY); });
}

TEST_P(State, MergedPartsAreAccurate) {
  Rng rng("merge");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const std::int64_t q_len : {1, 12}) {
      const std::int64_t split = split_len(dtype, q_len), kv_len = 2 * split + 200;
      const Inputs inputs({.dtype = dtype,
                           .q_len = q_len,
                           .kv_len = kv_len,
                           .head_dim = 32,
                           .causal = true,
                           .mask = Mask::kBool,
                           .sinks = true},
                          rng);
      const Call call = positioned(inputs.call());
      AttentionState first(call.q, options_of(call)), last(call.q, options_of(call), 2 * split);
      feed(first, call, 0, 2 * split);
      feed(last, call, 2 * split, kv_len);
      EXPECT_EQ(last.next_key(), kv_len);
      first.merge(std::move(last));
      EXPECT_EQ(first.next_key(), 2 * split);
      expect_right(call, finish(first, call), all_rows(call.q));
    }
}

TEST_P(State, AMergedStateCanBeFedFurther) {
  Rng rng("further");
  const Inputs inputs({.q_len = 5, .kv_len = 4300, .head_dim = 32}, rng);
  const Call call = positioned(inputs.call());
  const std::int64_t split = split_len(call);
  AttentionState first(call.q, options_of(call)), last(call.q, options_of(call), 2 * split);
  AttentionState nothing(call.q, options_of(call));
  feed(first, call, 0, 100);
  feed(last, call, 2 * split, 4300);
  first.merge(std::move(last));
  first.merge(std::move(nothing));
  feed(first, call, 100, 2 * split);
  expect_right(call, finish(first, call), all_rows(call.q));
}

TEST_P(State, MisuseIsNamedAndChangesNothing) {
  Rng rng("misuse");
  const Inputs inputs({.batch = 2,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .q_len = 5,
                       .kv_len = 300,
                       .head_dim = 16,
                       .mask = Mask::kAdditive},
                      rng);
  const Call call = positioned(inputs.call());
  const AttentionOptions good = options_of(call);
  const auto names = [](const char* argument, const std::function<void()>& misuse) {
    try {
      misuse();
      ADD_FAILURE() << argument << ": was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument) << static_cast<const Error&>(e).what();
    }
  };
  names("first_key", [&] { AttentionState(call.q, good, 1); });
  names("first_key", [&] { AttentionState(call.q, good, -split_len(call)); });
  names("q", [&] { AttentionState({}, good); });
  names("q_offset", [&] {
    AttentionOptions options = good;
    options.causal = true;
    options.q_offset.reset();
    AttentionState(call.q, options);
  });
  names("scale", [&] {
    AttentionOptions options = good;
    options.scale = INFINITY;
    AttentionState(call.q, options);
  });

  AttentionState state(call.q, good);
  names("other", [&] { state.merge(std::move(state)); });
  AttentionOptions scaled = good;
  scaled.scale = 0.5f;
  AttentionState differs(call.q, scaled);
  feed(differs, call, 0, 100);
  names("other", [&] { state.merge(std::move(differs)); });  // before its first key
  TensorView k = slice(call.k, 2, 0, 100), v = slice(call.v, 2, 0, 100);
  names("v", [&] { state.update(k, slice(call.v, 2, 0, 99)); });
  names("k", [&] { state.update(slice(call.k, 0, 0, 1), v); });
  names("k", [&] { state.update(slice(call.k, 3, 0, 15), v); });
  names("mask", [&] {
    k.sizes[2] = v.sizes[2] = 301;
    state.update(k, v);
  });
  EXPECT_EQ(state.next_key(), 0);
  feed(state, call, 0, 100);
  names("k", [&] { state.update(slice(call.k, 1, 0, 1), slice(call.v, 1, 0, 1)); });
  names("v", [&] { state.update(slice(call.k, 2, 0, 9), slice(slice(call.v, 2, 0, 9), 3, 0, 8)); });
  names("max_scratch_bytes", [&] {
    AttentionOptions options = good;
    options.run.max_scratch_bytes = 1;
    AttentionState small(call.q, options);
    feed(small, call, 0, 100);
  });
  names("other", [&] {
    AttentionOptions options = good;
    options.mask.reset();
    AttentionState other(call.q, options, split_len(call));
    feed(other, call, 100, 200);
    state.merge(std::move(other));
  });
  Tensor out(call.q.dtype, call.out_sizes());
  out.poison();
  names("out", [&] {
    MutableTensorView wrong = out.mutable_view();
    wrong.dtype = DType::kFloat16;
    state.finish(wrong);
  });
  EXPECT_TRUE(out.untouched());
  // After all of that the state still gives the right bits.
  EXPECT_EQ(state.next_key(), 100);
  feed(state, call, 100, 300);
  EXPECT_TRUE(finish(state, call).bytes() == run(call).bytes());
}

}  // namespace
}  // namespace keyfold::test

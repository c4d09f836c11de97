// A state as numbers: saved, loaded and gone on with, merged by others; and keys that are skipped.
#include <algorithm>
#include <cmath>
#include <functional>

#include "conformance/state_fixture.hpp"

namespace keyfold::test {
namespace {

class SavedState : public StateTest {
 protected:
  /// The numbers of a state, with garbage around them.
  struct Numbers {
    Numbers(const Call& call, Layout layout)
        : m(DType::kFloat32, rows(call), layout),
          l(DType::kFloat32, rows(call), layout),
          o(DType::kFloat32, call.out_sizes(), layout) {
      for (Tensor* tensor : {&m, &l, &o}) tensor->poison();
    }
    StateView view() { return {m.mutable_view(), l.mutable_view(), o.mutable_view()}; }
    bool only_elements_written() const {
      return m.only_elements_written() && l.only_elements_written() && o.only_elements_written();
    }

    Tensor m, l, o;

   private:
    static Dims rows(const Call& call) {
      return {call.q.sizes[0], call.q.sizes[1], call.q.sizes[2], 1};
    }
  };
  /// Sum of states over disjoint keys, in float64, as `to`.
  static void merge(const std::vector<Numbers>& parts, Numbers& to) {
    to.m.each([&](const Dims& i) {
      double m = -INFINITY, l = 0;
      for (const Numbers& part : parts) m = std::max<double>(m, part.m.at(i));
      const auto weight = [&](const Numbers& part) {
        return m == -INFINITY ? 0 : std::exp(part.m.at(i) - m);
      };
      for (const Numbers& part : parts) l += weight(part) * part.l.at(i);
      to.m.set(i, static_cast<float>(m));
      to.l.set(i, static_cast<float>(l));
      for (Dims d = i; d[3] < to.o.sizes()[3]; ++d[3]) {
        double o = 0;
        for (const Numbers& part : parts) o += weight(part) * part.o.at(d);
        to.o.set(d, static_cast<float>(o));
      }
    });
  }
};
KEYFOLD_FOR_EACH_BACKEND(SavedState);

TEST_P(SavedState, GoesOnToTheSameBits) {
  Rng rng("saved");
  for (int n = 0; n < by_scale(6, 30, 100) && !HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = 2,
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 30),
           .kv_len = rng.between(0, 5000),
           .head_dim = rng.pick<std::int64_t>({7, 32})};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(3)) c.mask = Mask::kBool;
    c.sinks = rng.one_in(2);
    c.layout = rng.pick<Layout>({Layout::kDense, Layout::kTransposed, Layout::kSliced});
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = positioned(inputs.call());
    const std::int64_t split = split_len(call);
    const std::int64_t cut = rng.between(0, c.kv_len / split) * split;

    AttentionState first(call.q, options_of(call));
    feed(first, call, 0, cut);
    Numbers numbers(call, c.layout);
    first.save(numbers.view());
    EXPECT_TRUE(numbers.only_elements_written());
    AttentionState second(call.q, options_of(call), cut);
    second.load(numbers.view(), c.num_kv_heads);
    EXPECT_EQ(second.next_key(), cut);
    feed(second, call, cut, c.kv_len);
    second.save(numbers.view());
    AttentionState third(call.q, options_of(call));
    third.load(numbers.view(), c.num_kv_heads);
    const std::vector<std::byte> expected = run(call).bytes();
    EXPECT_TRUE(finish(third, call, c.layout).bytes() == expected);
    EXPECT_TRUE(finish(second, call).bytes() == expected) << "saving changed the state";
  }
}

TEST_P(SavedState, PartsThatOthersMergeAreAccurate) {
  Rng rng("numbers");
  for (const std::int64_t q_len : {1, 12}) {
    const Case c{.num_heads = 4,
                 .num_kv_heads = 2,
                 .q_len = q_len,
                 .kv_len = 3 * split_len(DType::kFloat32, q_len) + 200,
                 .head_dim = 32,
                 .causal = true,
                 .mask = Mask::kBool,
                 .sinks = true};
    const Inputs inputs(c, rng);
    const Call call = positioned(inputs.call());
    const std::int64_t split = split_len(call);
    std::vector<Numbers> parts;
    for (const std::int64_t begin : {std::int64_t{0}, split, 2 * split}) {
      const std::int64_t end = begin == 2 * split ? c.kv_len : begin + split;
      AttentionState state(call.q, options_of(call), begin);
      feed(state, call, begin, end);
      parts.emplace_back(call, Layout::kDense);
      state.save(parts.back().view());
    }
    AttentionState nothing(call.q, options_of(call));
    parts.emplace_back(call, Layout::kDense);
    nothing.save(parts.back().view());
    parts.back().m.each([&](const Dims& i) { EXPECT_EQ(parts.back().m.at(i), -INFINITY); });
    Numbers all(call, Layout::kDense);
    merge(parts, all);
    AttentionState state(call.q, options_of(call));
    state.load(all.view(), c.num_kv_heads);
    expect_right(call, finish(state, call), all_rows(call.q));
  }
}

TEST_P(SavedState, SkippedKeysAreAsHidden) {
  Rng rng("skip");
  for (const std::int64_t q_len : {1, 12}) {
    const std::int64_t split = split_len(DType::kFloat32, q_len), kv_len = 5 * split + 300;
    Inputs inputs({.q_len = q_len, .kv_len = kv_len, .head_dim = 16, .mask = Mask::kAdditive}, rng);
    const Call call = positioned(inputs.call());
    AttentionState state(call.q, options_of(call));
    feed(state, call, 0, split);
    state.skip_to(3 * split);
    feed(state, call, 3 * split, 4 * split);
    state.skip_to(5 * split);
    feed(state, call, 5 * split, kv_len);
    EXPECT_EQ(state.next_key(), kv_len);
    const Outputs got = finish(state, call);
    inputs.mask.each([&](const Dims& i) {
      const std::int64_t number = i[3] / split;
      if (number == 1 || number == 2 || number == 4) inputs.mask.set(i, -INFINITY);
    });
    EXPECT_TRUE(got.bytes() == run(positioned(inputs.call())).bytes());
  }
}

TEST_P(SavedState, MisuseIsNamedAndChangesNothing) {
  Rng rng("misuse of numbers");
  const std::int64_t split = split_len(DType::kFloat32, 5);
  const Inputs inputs(
      {.num_heads = 4, .num_kv_heads = 2, .q_len = 5, .kv_len = split + 300, .head_dim = 16}, rng);
  const Call call = positioned(inputs.call());
  const auto names = [](const char* argument, const std::function<void()>& misuse) {
    try {
      misuse();
      ADD_FAILURE() << argument << ": was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument) << static_cast<const Error&>(e).what();
    }
  };
  AttentionState state(call.q, options_of(call));
  feed(state, call, 0, 100);
  names("key", [&] { state.skip_to(split + 1); });
  names("key", [&] { state.skip_to(0); });
  Numbers numbers(call, Layout::kDense);
  const auto wrong = [&](const std::function<void(StateView&)>& spoil) {
    StateView view = numbers.view();
    spoil(view);
    return view;
  };
  const StateView half = wrong([](StateView& view) { view.m.dtype = DType::kFloat16; });
  const StateView narrow = wrong([](StateView& view) { view.o.sizes[3] -= 1; });
  const StateView nowhere = wrong([](StateView& view) { view.l.data = nullptr; });
  names("m", [&] { state.save(half); });
  names("o", [&] { state.save(narrow); });
  names("l", [&] { state.save(nowhere); });
  EXPECT_TRUE(numbers.m.untouched() && numbers.l.untouched() && numbers.o.untouched());
  names("l", [&] { state.load(nowhere, 2); });
  names("num_kv_heads", [&] { state.load(numbers.view(), 4); });
  EXPECT_EQ(state.next_key(), 100);
  feed(state, call, 100, split + 300);
  const std::vector<std::byte> expected = run(call).bytes();

  state.save(numbers.view());
  names("k", [&] { feed(state, call, 0, 1); });  // inside a split that is folded already
  EXPECT_TRUE(finish(state, call).bytes() == expected);
  names("num_heads", [&] { AttentionState(call.q, options_of(call)).load(numbers.view(), 3); });
}

}  // namespace
}  // namespace keyfold::test

// NaN and Inf among the visible values: out where IEEE arithmetic puts them, and nowhere else.
#include <cmath>
#include <functional>
#include <limits>

#include "support/backends.hpp"

namespace keyfold::test {
namespace {

constexpr std::int64_t kDim = 24;

class Values : public BackendTest {
 protected:
  using Spoil = std::function<void(Inputs&)>;

  void expect_right_after(Case c, const Spoil& spoil) const {
    Rng rng("values");
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (const std::int64_t q_len : {1, 14}) {
        c.dtype = dtype;
        c.q_len = q_len;
        c.head_dim = kDim;
        Inputs inputs(c, rng);
        spoil(inputs);
        SCOPED_TRACE(testing::Message() << c);
        const Call call = inputs.call();
        expect_right(call, run(call), all_rows(call.q));
      }
  }
};
KEYFOLD_FOR_EACH_BACKEND(Values);

TEST_P(Values, InQ) {
  for (const Case& c : {Case{.kv_len = 1100}, Case{.kv_len = 1100, .softcap = 2.0f}}) {
    expect_right_after(c, [](Inputs& in) { in.q.set({0, 1, in.c.q_len / 2, 5}, kNaN); });
    expect_right_after(c, [](Inputs& in) { in.q.set({0, 1, in.c.q_len / 2, 5}, kInf); });
    expect_right_after(c, [](Inputs& in) { in.q.set({0, 0, 0, kDim - 1}, -kInf); });
  }
}

TEST_P(Values, InK) {
  for (const Case& c : {Case{.kv_len = 1100}, Case{.kv_len = 1100, .causal = true},
                        Case{.kv_len = 1100, .softcap = 2.0f}})
    for (const Spoil& spoil : {
             Spoil([](Inputs& in) {
               in.k.set({0, 0, 0, 0}, kNaN);
             }),
             Spoil([](Inputs& in) {
               in.k.set({0, 0, 1095, 3}, kNaN);
             }),
             Spoil([](Inputs& in) {
               in.k.set({0, 0, 700, 3}, kInf);
             }),
             Spoil([](Inputs& in) {
               in.k.set({0, 0, 700, 3}, -kInf);
             }),
         })
      expect_right_after(c, spoil);
}

TEST_P(Values, InV) {
  for (const Case& c : {Case{.kv_len = 1100}, Case{.kv_len = 1100, .causal = true}})
    for (const Spoil& spoil : {
             Spoil([](Inputs& in) {
               in.v.set({0, 0, 0, 0}, kNaN);
             }),
             Spoil([](Inputs& in) {
               in.v.set({0, 0, 1095, 3}, kInf);
             }),
             Spoil([](Inputs& in) {
               in.v.set({0, 0, 700, kDim - 1}, -kInf);
             }),
             Spoil([](Inputs& in) {  // two infinities that cancel
               in.v.set({0, 0, 3, 7}, kInf);
               in.v.set({0, 0, 1000, 7}, -kInf);
             }),
         })
      expect_right_after(c, spoil);
}

TEST_P(Values, InVOfWideHeads) {
  Rng rng("wide");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    Inputs inputs({.dtype = dtype, .q_len = 40, .kv_len = 300, .head_dim = 72, .causal = true},
                  rng);
    inputs.v.set({0, 0, 3, 5}, kInf);
    inputs.v.set({0, 0, 100, 70}, kNaN);
    inputs.v.set({0, 0, 280, 63}, kInf);
    inputs.v.set({0, 0, 299, 71}, -kInf);
    const Call call = inputs.call();
    expect_right(call, run(call), all_rows(call.q));
  }
}

TEST_P(Values, InTheMask) {
  const Case c{.kv_len = 1100, .mask = Mask::kAdditive};
  expect_right_after(c, [](Inputs& in) { in.mask.set({0, 0, 0, 600}, kNaN); });
  expect_right_after(c, [](Inputs& in) { in.mask.set({0, 0, 0, 600}, kInf); });
  expect_right_after(c, [](Inputs& in) { in.mask.set({0, 0, 0, 600}, -1e30f); });
  expect_right_after(c, [](Inputs& in) { in.mask.set({0, 0, 0, 600}, 1e30f); });
}

TEST_P(Values, ScoresFarFromZero) {
  // Frameworks hide keys by the lowest number: rows of it alone, rows that begin or end with it.
  const Case masked{.kv_len = 1100, .mask = Mask::kAdditive};
  expect_right_after(masked, [](Inputs& in) {
    in.mask.each([&](const Dims& i) {
      const bool low = i[2] % 4 == 0 || (i[2] % 4 == 1) == (i[3] < 700);
      if (low) in.mask.set(i, std::numeric_limits<float>::lowest());
    });
  });
  for (const float far : {-1e6f, 1e6f, 1e30f})
    for (const std::int64_t from : {0, 600}) {
      expect_right_after(masked, [&](Inputs& in) {
        in.mask.each([&](const Dims& i) {
          if (i[3] >= from) in.mask.set(i, far);
        });
      });
    }
}

TEST_P(Values, AnInfiniteSinkTakesAllWeight) {
  Rng rng("sink");
  Inputs inputs({.num_heads = 2, .q_len = 3, .kv_len = 70, .head_dim = kDim, .sinks = true}, rng);
  inputs.sinks.set({0, 1, 0, 0}, kInf);
  const Outputs got = run(inputs.call());
  for (std::int64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(got.lse.at({0, 1, i, 0}), kInf);
    for (std::int64_t d = 0; d < kDim; ++d) EXPECT_EQ(got.out.at({0, 1, i, d}), 0);
    EXPECT_TRUE(std::isfinite(got.lse.at({0, 0, i, 0})));
  }
}

TEST_P(Values, AWeightThatVanishesAddsNothing) {
  // Key `top` outweighs all others by far; what those hold does not matter, before or behind it.
  Rng rng("vanish");
  for (const std::int64_t top : {2, 600, 1099})
    for (const std::int64_t other : {0, 500, 511, 512, 1098}) {
      SCOPED_TRACE(testing::Message() << "top " << top << " other " << other);
      Inputs inputs({.dtype = other == 500 ? DType::kFloat16 : DType::kFloat32,
                     .q_len = other == 500 ? 14 : 3,
                     .kv_len = 1100,
                     .head_dim = kDim,
                     .mask = Mask::kAdditive},
                    rng);
      inputs.mask.each([&](const Dims& i) { inputs.mask.set(i, i[3] == top ? 500.0f : 0.0f); });
      inputs.v.set({0, 0, other, 5}, kInf);
      inputs.v.set({0, 0, other, 6}, kNaN);
      const Call call = inputs.call();
      expect_right(call, run(call), all_rows(call.q));
    }
}

TEST_P(Values, ASumThatOverflowsMayStillVanish) {
  // Before key `top` comes, values add up to more than float32 holds; then it outweighs them.
  Rng rng("overflow");
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const std::int64_t top : {300, 1099}) {
      SCOPED_TRACE(testing::Message() << "top " << top);
      Inputs inputs(
          {.dtype = dtype, .q_len = 14, .kv_len = 1100, .head_dim = kDim, .mask = Mask::kAdditive},
          rng);
      inputs.mask.each([&](const Dims& i) { inputs.mask.set(i, i[3] == top ? 500.0f : 0.0f); });
      inputs.v.each([&](const Dims& i) { inputs.v.set(i, i[2] == top ? 1.0f : 3e38f); });
      const Call call = inputs.call();
      expect_right(call, run(call), all_rows(call.q));
    }
}

TEST_P(Values, LargeButFinite) {
  Rng rng("large");
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const std::int64_t q_len : {6, 14}) {
      Inputs inputs({.dtype = dtype, .q_len = q_len, .kv_len = 700, .head_dim = kDim}, rng);
      inputs.v.fill([&] { return 1e37f * rng.normal(); });
      inputs.q.fill([&] { return 1e15f * rng.normal(); });
      inputs.k.fill([&] { return 1e15f * rng.normal(); });
      const Call call = inputs.call();
      expect_right(call, run(call), all_rows(call.q));
    }
}

}  // namespace
}  // namespace keyfold::test

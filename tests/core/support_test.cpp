// The tests' own tools: a judge that could not fail, or a wrong reference, would prove nothing.
#include <gtest/gtest.h>

#include <cmath>

#include "support/case.hpp"
#include "support/judge.hpp"

namespace keyfold::test {
namespace {

/// One head, two rows, three keys, dim 1: small enough for a pocket calculator.
struct Tiny {
  float q[2] = {1, 2}, k[3] = {0.5f, -1, 0.25f}, v[3] = {10, 20, 30};
  AttentionOptions options;

  Tiny() { options.scale = 1.0f; }

  Rows exact() const {
    const TensorView tq(q, DType::kFloat32, {1, 1, 2, 1}), tk(k, DType::kFloat32, {1, 1, 3, 1}),
        tv(v, DType::kFloat32, {1, 1, 3, 1});
    return reference(tq, tk, tv, options, all_rows(tq));
  }
};

TEST(Reference, PlainSoftmax) {
  const Rows r = Tiny().exact();
  const double a = std::exp(0.5), b = std::exp(-1), c = std::exp(0.25);
  EXPECT_DOUBLE_EQ(r.lse[0], std::log(a + b + c));
  EXPECT_DOUBLE_EQ(r.out[0], (10 * a + 20 * b + 30 * c) / (a + b + c));
  EXPECT_DOUBLE_EQ(r.lse[1], std::log(a * a + b * b + c * c));
}

TEST(Reference, CausalIsAlignedBottomRight) {
  Tiny t;
  t.options.causal = true;
  const Rows r = t.exact();
  EXPECT_DOUBLE_EQ(r.lse[0], std::log(std::exp(0.5) + std::exp(-1)));
  EXPECT_DOUBLE_EQ(r.lse[1], std::log(std::exp(1) + std::exp(-2) + std::exp(0.5)));
  t.options.q_offset = -1;
  EXPECT_EQ(t.exact().lse[0], -INFINITY);
  EXPECT_EQ(t.exact().out[0], 0);
  EXPECT_EQ(t.exact().lse[1], 1);
}

TEST(Reference, WindowSoftcapMaskSinkAndLengths) {
  Tiny t;
  t.options.window = {.left = 0, .right = 0};
  EXPECT_DOUBLE_EQ(t.exact().lse[0], -1);  // row 0 stands at key 1
  EXPECT_DOUBLE_EQ(t.exact().lse[1], 0.5);
  t = {};
  t.options.softcap = 0.5f;
  const auto cap = [](double x) { return 0.5 * std::tanh(x / 0.5); };
  EXPECT_DOUBLE_EQ(t.exact().lse[0],
                   std::log(std::exp(cap(0.5)) + std::exp(cap(-1)) + std::exp(cap(0.25))));
  t = {};
  const float bias[3] = {1, -kInf, 2};
  t.options.mask = TensorView(bias, DType::kFloat32, {1, 1, 1, 3});
  EXPECT_DOUBLE_EQ(t.exact().lse[0], std::log(std::exp(1.5) + std::exp(2.25)));
  const bool hidden[3] = {false, true, false};
  t.options.mask = TensorView(hidden, DType::kBool, {1, 1, 1, 3});
  EXPECT_DOUBLE_EQ(t.exact().lse[0], -1);
  t = {};
  const float sink = 3;
  t.options.sinks = TensorView(&sink, DType::kFloat32, {1, 1, 1, 1});
  const std::int64_t none[1] = {0}, one[1] = {1};
  t.options.kv_lens = one;
  EXPECT_DOUBLE_EQ(t.exact().lse[0], std::log(std::exp(3) + std::exp(0.5)));
  EXPECT_DOUBLE_EQ(t.exact().out[0], 10 / (1 + std::exp(2.5)));
  t.options.kv_lens = none;
  EXPECT_EQ(t.exact().lse[0], 3);
  EXPECT_EQ(t.exact().out[0], 0);
}

TEST(Reference, NotFinite) {
  Tiny t;
  t.v[1] = kInf;
  EXPECT_EQ(t.exact().out[0], INFINITY);
  t.v[1] = kNaN;
  EXPECT_TRUE(std::isnan(t.exact().out[0]));
  EXPECT_FALSE(std::isnan(t.exact().lse[0]));
  t.options.kv_lens = {};
  t = {};
  t.k[2] = kNaN;
  EXPECT_TRUE(std::isnan(t.exact().out[0]));
  EXPECT_TRUE(std::isnan(t.exact().lse[0]));
  t.options.causal = true;
  EXPECT_FALSE(std::isnan(t.exact().out[0]));  // row 0 does not see it
}

/// A finished output that is right, to be spoiled.
struct Finished {
  Finished() {
    rows = all_rows(call.q);
    exact = reference(call.q, call.k, call.v, call.options, rows);
    plain = naive(call.q, call.k, call.v, call.options, rows);
    out.poison();
    lse.poison();
    for (std::size_t r = 0; r < rows.size(); ++r) {
      const Dims i{rows[r].batch, rows[r].head, rows[r].row, 0};
      lse.set(i, static_cast<float>(exact.lse[r]));
      for (std::int64_t d = 0; d < 64; ++d)
        out.set({i[0], i[1], i[2], d},
                static_cast<float>(exact.out[r * 64 + static_cast<std::size_t>(d)]));
    }
  }
  bool right() const { return static_cast<bool>(test::right(out, &lse, rows, exact, plain)); }

  Rng rng{"judge"};
  Inputs inputs{{.dtype = DType::kFloat16, .num_heads = 2, .q_len = 8, .kv_len = 100}, rng};
  Call call = inputs.call();
  Tensor out{DType::kFloat16, {1, 2, 8, 64}, Layout::kSliced}, lse{DType::kFloat32, {1, 2, 8, 1}};
  std::vector<RowId> rows;
  Rows exact, plain;
};

TEST(Judge, PassesTheReferenceAndTheNaive) {
  Finished f;
  EXPECT_TRUE(f.right());
  for (std::size_t r = 0; r < f.rows.size(); ++r)
    for (std::int64_t d = 0; d < 64; ++d)
      f.out.set({0, f.rows[r].head, f.rows[r].row, d},
                static_cast<float>(f.plain.out[r * 64 + static_cast<std::size_t>(d)]));
  EXPECT_TRUE(f.right());
}

TEST(Judge, FailsWhatIsWrong) {
  using Spoil = void (*)(Finished&);
  const Spoil spoils[] = {
      [](Finished& f) {
        f.out.set({0, 1, 3, 5}, kNaN);
      },
      [](Finished& f) {
        f.out.set({0, 1, 3, 5}, kInf);
      },
      [](Finished& f) {
        f.out.set({0, 1, 3, 5}, f.out.at({0, 1, 3, 5}) + 0.01f);
      },
      [](Finished& f) {
        f.lse.set({0, 0, 0, 0}, f.lse.at({0, 0, 0, 0}) + 2e-5f);
      },
      [](Finished& f) {
        f.lse.set({0, 0, 0, 0}, kNaN);
      },
      [](Finished& f) { f.exact.out[7] = INFINITY; },
      [](Finished& f) {
        f.out.set({0, 0, 7, 64}, 0);
      },  // behind the row's end
      [](Finished& f) { f.out.poison(); },
      [](Finished& f) { f.lse.poison(); },
      // A small error everywhere: the largest is fine, the rms is not.
      [](Finished& f) { f.out.each([&](const Dims& i) { f.out.set(i, f.out.at(i) * 1.002f); }); },
  };
  int n = 0;
  for (const Spoil spoil : spoils) {
    SCOPED_TRACE(n++);
    Finished f;
    spoil(f);
    EXPECT_FALSE(f.right());
  }
}

TEST(Tensor, EveryLayoutHoldsItsElements) {
  for (const Layout layout :
       {Layout::kDense, Layout::kTransposed, Layout::kSliced, Layout::kStridedDim}) {
    Tensor t(DType::kFloat32, {2, 3, 4, 5}, layout);
    float next = 0;
    t.fill([&] { return next++; });
    next = 0;
    t.each([&](const Dims& i) { EXPECT_EQ(t.at(i), next++); });
    EXPECT_EQ(t.bytes().size(), 480u);
    t.poison();
    EXPECT_TRUE(t.untouched());
    t.set({1, 2, 3, 4}, 1);
    EXPECT_FALSE(t.untouched());
    EXPECT_TRUE(t.only_elements_written());
  }
}

}  // namespace
}  // namespace keyfold::test

// merge_state on finished outputs.
#include <cmath>

#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class MergeState : public BackendTest {};
KEYFOLD_FOR_EACH_BACKEND(MergeState);

TEST_P(MergeState, HalvesOfTheKeysGiveTheWhole) {
  Rng rng("halves");
  for (const std::int64_t cut : {1, 64, 700, 1299}) {
    const Inputs inputs({.batch = 2,
                         .num_heads = 4,
                         .num_kv_heads = 2,
                         .q_len = 9,
                         .kv_len = 1300,
                         .head_dim = 32,
                         .causal = true},
                        rng);
    const Call call = inputs.call();
    Outputs a = run(call.keys(0, cut));
    const Outputs b = run(call.keys(cut, 1300), {}, Layout::kTransposed);
    merge_state(a.out.mutable_view(), a.lse.mutable_view(), b.out.view(), b.lse.view());
    expect_right(call, a, all_rows(call.q));
  }
}

TEST_P(MergeState, FollowsItsFormula) {
  Rng rng("formula");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Dims sizes{2, 3, 16, 7}, rows{2, 3, 16, 1};
    Tensor out_a(dtype, sizes, Layout::kSliced), out_b(dtype, sizes, Layout::kTransposed);
    Tensor lse_a(DType::kFloat32, rows, Layout::kSliced), lse_b(DType::kFloat32, rows);
    out_a.poison();
    lse_a.poison();
    for (Tensor* t : {&out_a, &out_b}) t->fill([&] { return rng.normal(); });
    for (Tensor* t : {&lse_a, &lse_b})
      t->fill([&] { return rng.one_in(4) ? -kInf : 20 * rng.normal(); });
    const Tensor old_out = out_a, old_lse = lse_a;
    merge_state(out_a.mutable_view(), lse_a.mutable_view(), out_b.view(), lse_b.view());
    const double unit = dtype == DType::kFloat32   ? 0x1p-22
                        : dtype == DType::kFloat16 ? 0x1p-10
                                                   : 0x1p-7;
    out_a.each([&](const Dims& i) {
      const Dims row{i[0], i[1], i[2], 0};
      const double la = old_lse.at(row), lb = lse_b.at(row);
      const double lse = std::max(la, lb) == -INFINITY
                             ? -INFINITY
                             : std::max(la, lb) + std::log1p(std::exp(-std::abs(la - lb)));
      const double a = lse == -INFINITY ? 0 : std::exp(la - lse) * old_out.at(i);
      const double b = lse == -INFINITY ? 0 : std::exp(lb - lse) * out_b.at(i);
      EXPECT_NEAR(out_a.at(i), a + b, unit * (std::abs(a) + std::abs(b)));
      if (lse == -INFINITY) {
        EXPECT_EQ(lse_a.at(row), -kInf);
      } else {
        EXPECT_NEAR(lse_a.at(row), lse, 0x1p-22 * std::max(1.0, std::abs(lse)));
      }
    });
    EXPECT_TRUE(out_a.only_elements_written());
    EXPECT_TRUE(lse_a.only_elements_written());
  }
}

}  // namespace
}  // namespace keyfold::test

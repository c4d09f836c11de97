// Memory orders of inputs and outputs, with garbage behind every slice.
#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class Layouts : public BackendTest {};
KEYFOLD_FOR_EACH_BACKEND(Layouts);

TEST_P(Layouts, OfInputs) {
  Rng rng("inputs");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const Layout layout : {Layout::kDense, Layout::kTransposed, Layout::kSliced,
                                Layout::kStridedDim, Layout::kRepeatHeads, Layout::kRepeatKeys})
      for (const std::int64_t q_len : {1, 19})
        expect_right({.dtype = dtype,
                      .batch = 2,
                      .num_heads = 4,
                      .num_kv_heads = 2,
                      .q_len = q_len,
                      .kv_len = 620,
                      .head_dim = 20,
                      .value_dim = 12,
                      .mask = Mask::kAdditiveSameDType,
                      .sinks = true,
                      .layout = layout},
                     rng);
}

TEST_P(Layouts, OfOutputs) {
  Rng rng("outputs");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const Layout layout : {Layout::kTransposed, Layout::kSliced, Layout::kStridedDim})
      for (const std::int64_t scratch : {std::int64_t{0}, std::int64_t{1}}) {
        const Case c{.dtype = dtype,
                     .batch = 2,
                     .num_heads = 4,
                     .num_kv_heads = 2,
                     .q_len = 19,
                     .kv_len = 100,
                     .head_dim = 20,
                     .value_dim = 12};
        RunOptions how;
        const Inputs inputs(c, rng);
        if (scratch != 0) how.max_scratch_bytes = plan_of(inputs.call()).scratch_bytes - 1;
        const Outputs got = run(inputs.call(), how, layout);
        expect_right(inputs.call(), got, all_rows(inputs.call().q));
        EXPECT_EQ(got.bytes(), run(inputs.call()).bytes());
      }
}

TEST_P(Layouts, TheSameBitsInEveryOrder) {
  Rng rng("orders");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Case c{.dtype = dtype,
                 .batch = 2,
                 .num_heads = 4,
                 .num_kv_heads = 2,
                 .q_len = 9,
                 .kv_len = 620,
                 .head_dim = 33};
    const Inputs dense(c, rng);
    const std::vector<std::byte> expected = run(dense.call()).bytes();
    for (const Layout layout : {Layout::kTransposed, Layout::kSliced, Layout::kStridedDim}) {
      const auto reordered = [&](const Tensor& from) {
        Tensor to(dtype, from.sizes(), layout);
        from.each([&](const Dims& i) { to.set(i, from.at(i)); });
        return to;
      };
      const Tensor q = reordered(dense.q), k = reordered(dense.k), v = reordered(dense.v);
      EXPECT_EQ(run({q.view(), k.view(), v.view(), {}}).bytes(), expected) << name_of(layout);
    }
  }
}

TEST_P(Layouts, StridesOfSingleElementsMeanNothing) {
  Rng rng("single");
  Inputs inputs({.q_len = 1, .kv_len = 700, .head_dim = 16}, rng);
  const Call call = inputs.call();
  const std::vector<std::byte> expected = run(call).out.bytes();
  for (const std::int64_t stride : {-1, 0, 1 << 20}) {
    Call odd = call;
    odd.q.strides[0] = odd.q.strides[2] = odd.k.strides[0] = odd.v.strides[0] = stride;
    EXPECT_EQ(run(odd).out.bytes(), expected) << stride;
  }
}

TEST_P(Layouts, OutMayBeAnInput) {
  Rng rng("alias");
  for (const bool blocks : {false, true}) {
    Inputs inputs({.q_len = 30, .kv_len = 700, .head_dim = 16}, rng);
    const Call call = inputs.call();
    const std::vector<std::byte> expected = run(call).out.bytes();
    AttentionOptions options = call.options;
    options.run.backend = GetParam();
    if (blocks) options.run.max_scratch_bytes = plan_of(call).scratch_bytes - 1;
    scaled_dot_product_attention(call.q, call.k, call.v, inputs.q.mutable_view(), options);
    EXPECT_EQ(inputs.q.bytes(), expected);
  }
}

}  // namespace
}  // namespace keyfold::test

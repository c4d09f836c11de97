// Attention over a source: the bits of the call over arrays for every cut, mask and row block.
#include <algorithm>

#include "support/array_source.hpp"
#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class Source : public BackendTest {
 protected:
  /// The call over this source, into poisoned outputs.
  Outputs run_source(const Call& call, KeyValueSource& source, RunOptions how = {}) const {
    const Dims sizes = call.out_sizes();
    Outputs got{Tensor(call.q.dtype, sizes),
                Tensor(DType::kFloat32, {sizes[0], sizes[1], sizes[2], 1}),
                {}};
    got.out.poison();
    got.lse.poison();
    AttentionOptions options = call.options;
    how.backend = GetParam();
    options.run = how;
    options.lse = got.lse.mutable_view();
    const auto attend = [&] {
      got.report = scaled_dot_product_attention(call.q, source, got.out.mutable_view(), options);
    };
    if (expected_.empty()) {
      attend();
      return got;
    }
    try {
      attend();
      ADD_FAILURE() << "expected an error with: " << expected_;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(expected_), std::string::npos) << error.what();
    }
    EXPECT_TRUE(got.out.untouched());
    EXPECT_TRUE(got.lse.untouched());
    return got;
  }
  void expect_error(const std::string& text, const Call& call, KeyValueSource& source,
                    const RunOptions& how = {}) {
    expected_ = text;
    run_source(call, source, how);
    expected_.clear();
  }

  std::string expected_;
};
KEYFOLD_FOR_EACH_BACKEND(Source);

TEST_P(Source, AnyPiecesGiveTheBitsOfArrays) {
  Rng rng("pieces");
  for (int n = 0; n < by_scale(8, 60, 250) && !HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 3),
           .num_heads = 4,
           .num_kv_heads = rng.pick<std::int64_t>({1, 2}),
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 70),
           .kv_len = rng.between(0, 3000),
           .head_dim = rng.pick<std::int64_t>({7, 32})};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(3)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(4)) c.window.right = rng.between(0, c.kv_len);
    if (rng.one_in(3)) c.q_offset = rng.between(-50, c.kv_len + 50);
    if (rng.one_in(3)) c.mask = rng.one_in(2) ? Mask::kAdditive : Mask::kBool;
    if (rng.one_in(4)) c.softcap = 3.0F;
    c.sinks = rng.one_in(2);
    if (rng.one_in(3))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    c.layout = rng.pick<Layout>({Layout::kDense, Layout::kTransposed, Layout::kSliced});
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    const Outputs expected = run(call);

    const std::int64_t split = split_len(call);
    const std::int64_t most = rng.pick<std::int64_t>({3000, 700, 100});
    const bool whole_splits = rng.one_in(2);
    ArraySource source(call, [&](std::int64_t left) {
      const std::int64_t length = rng.between(1, most);
      return std::min(left, whole_splits ? (length + split - 1) / split * split : length);
    });
    EXPECT_TRUE(run_source(call, source).bytes() == expected.bytes());
    EXPECT_EQ(source.releases_, source.seeks_);

    // In as many row blocks as the least scratch makes.
    RunOptions how;
    how.max_scratch_bytes = std::max<std::int64_t>(plan_of(call).scratch_bytes - 1, 1);
    try {
      plan_of(call, how);
    } catch (const InvalidArgument&) {
      continue;  // not even one row fits
    }
    EXPECT_TRUE(run_source(call, source, how).bytes() == expected.bytes());
  }
}

TEST_P(Source, ALengthThatIsNotKnown) {
  Rng rng("open end");
  const Inputs inputs({.q_len = 5, .kv_len = 1300, .head_dim = 16, .causal = true}, rng);
  Call call = inputs.call();
  const Outputs expected = run(call);
  ArraySource source(call, [](std::int64_t left) { return std::min<std::int64_t>(left, 333); });
  source.grows_ = true;
  expect_error("q_offset", call, source);
  call.options.q_offset = 1300 - 5;
  EXPECT_TRUE(run_source(call, source).bytes() == expected.bytes());
}

TEST_P(Source, WhatNoRowSeesIsNotAskedFor) {
  Rng rng("window");
  Case c{.q_len = 1, .kv_len = 9000, .head_dim = 16};
  c.window.left = 99;
  const Inputs inputs(c, rng);
  const Call call = inputs.call();
  const std::int64_t split = split_len(call);
  ArraySource source(call, [](std::int64_t left) { return std::min<std::int64_t>(left, 50); });
  EXPECT_TRUE(run_source(call, source).bytes() == run(call).bytes());
  EXPECT_LE(source.given_, 100 + split);
}

TEST_P(Source, RowBlocksReadTheKeysAgain) {
  Rng rng("blocks");
  const Inputs inputs({.num_heads = 4, .q_len = 200, .kv_len = 1500, .head_dim = 64}, rng);
  const Call call = inputs.call();
  RunOptions how;
  how.max_scratch_bytes = plan_of(call).scratch_bytes - 1;
  const std::int64_t blocks = plan_of(call, how).num_row_blocks;
  ASSERT_GT(blocks, 1);
  ArraySource source(call, [](std::int64_t left) { return std::min<std::int64_t>(left, 512); });
  const Outputs got = run_source(call, source, how);
  EXPECT_TRUE(got.bytes() == run(call).bytes());
  EXPECT_EQ(source.seeks_, blocks);
  EXPECT_GT(got.report.staging_bytes, 0);

  source.seeks_left_ = 1;  // what the first block gave is not written either
  expect_error("the source is broken", call, source, how);
}

TEST_P(Source, AFailureLeavesTheOutputsUntouched) {
  Rng rng("failures");
  const Inputs inputs({.q_len = 3, .kv_len = 2000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  const auto pieces = [](std::int64_t left) { return std::min<std::int64_t>(left, 600); };
  ArraySource broken(call, pieces);
  broken.fails_at_ = 1200;
  expect_error("the source is broken", call, broken);
  ArraySource shorter(call, pieces);
  shorter.size_ = 2001;
  expect_error("expected 2001 keys, as it said, got its end behind 2000", call, shorter);

  const Inputs other({.dtype = DType::kFloat16, .batch = 2, .q_len = 3, .head_dim = 8}, rng);
  ArraySource misfit(other.call(), pieces);
  expect_error("expected batch 1, as q has it, got 2", call, misfit);
  Call masked = call;
  Tensor mask(DType::kBool, {1, 1, 1, 1999});
  masked.options.mask = mask.view();
  ArraySource grows(call, pieces);
  grows.grows_ = true;
  expect_error("mask: expected a mask over all keys", masked, grows);
}

}  // namespace
}  // namespace keyfold::test

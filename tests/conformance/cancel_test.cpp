// Progress and cancelling on a real backend: at every chunk, with one row block and with several.
#include "support/backends.hpp"
#include "support/device_tensors.hpp"

namespace keyfold::test {
namespace {

class Cancel : public BackendTest {};
KEYFOLD_FOR_EACH_BACKEND(Cancel);

TEST_P(Cancel, AtEveryChunkLeavesOutUntouched) {
  Rng rng("cancel");
  const Inputs inputs({.batch = 2,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .q_len = 20,
                       .kv_len = 2600,
                       .head_dim = 16,
                       .causal = true},
                      rng);
  const Call call = inputs.call();
  const Dims sizes = call.out_sizes();
  Tensor out(DType::kFloat32, sizes), lse(DType::kFloat32, {sizes[0], sizes[1], sizes[2], 1});
  out.poison();
  lse.poison();
  for (const bool blocks : {false, true}) {
    RunOptions how;
    how.chunk_size = split_len(call);
    how.budget_ms = 60000;  // as many dispatches every time
    if (blocks) how.max_scratch_bytes = plan_of(call, how).scratch_bytes - 1;
    const std::int64_t total = run(call, how).report.dispatches;
    EXPECT_GT(total, 2);
    for (std::int64_t stop_at = 0; stop_at <= total; ++stop_at) {
      std::stop_source stop;
      if (stop_at == 0) stop.request_stop();
      AttentionOptions options = call.options;
      options.run = how;
      options.run.backend = GetParam();
      options.run.stop_token = stop.get_token();
      options.run.progress = [&](const Progress& p) {
        if (p.dispatches == stop_at) stop.request_stop();
      };
      options.lse = lse.mutable_view();
      try {
        scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), options);
        ADD_FAILURE() << "was not cancelled at " << stop_at;
      } catch (const Cancelled& e) {
        EXPECT_GE(e.where().dispatches, stop_at);
        EXPECT_LE(e.where().dispatches, stop_at + 1);
        EXPECT_LE(e.where().next_key, 2600);
      }
      EXPECT_TRUE(out.untouched());
      EXPECT_TRUE(lse.untouched());
    }
  }
}

TEST_P(Cancel, ProgressSaysHowFar) {
  Rng rng("progress");
  const Inputs inputs({.q_len = 20, .kv_len = 5000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  if (on_device(GetParam(), call)) GTEST_SKIP() << "the last dispatch is not waited for";
  RunOptions how;
  how.chunk_size = split_len(call);
  how.budget_ms = 60000;  // never too slow for whole sweeps
  std::vector<Progress> all;
  how.progress = [&](const Progress& p) { all.push_back(p); };
  const Report report = run(call, how).report;
  ASSERT_EQ(static_cast<std::int64_t>(all.size()), report.dispatches);
  for (std::size_t i = 1; i < all.size(); ++i) {
    EXPECT_GT(all[i].fraction, all[i - 1].fraction);
    EXPECT_GT(all[i].next_key, all[i - 1].next_key);
  }
  EXPECT_NEAR(all.back().fraction, 1, 1e-9);
  EXPECT_EQ(all.back().longest_dispatch_ms, report.longest_dispatch_ms);
  EXPECT_GT(report.longest_dispatch_ms, 0);
  EXPECT_GE(report.elapsed_ms, report.longest_dispatch_ms);
  EXPECT_EQ(report.backend, GetParam());
  EXPECT_EQ(report.kernel, plan_of(call).kernel);
  EXPECT_EQ(report.scratch_bytes, plan_of(call).scratch_bytes);
}

TEST_P(Cancel, ScratchStaysWithinItsLimitAndDoesNotGrowWithKeys) {
  Rng rng("scratch");
  std::int64_t scratch = -1;
  for (const std::int64_t kv_len : {10, 1000, 10000}) {
    const Inputs inputs({.q_len = 70, .kv_len = kv_len, .head_dim = 16}, rng);
    const std::int64_t got = run(inputs.call()).report.scratch_bytes;
    if (scratch < 0) scratch = got;
    EXPECT_EQ(got, scratch);
  }
}

}  // namespace
}  // namespace keyfold::test

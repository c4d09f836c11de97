// Attention of many ranks: right and, in order, the bits of one process; failures reach all.
#include <algorithm>
#include <chrono>
#include <numeric>

#include "ranks/shares.hpp"
#include "ranks/thread_transport.hpp"

namespace keyfold::test {
namespace {

class Ranks : public BackendTest {
 protected:
  std::vector<RankCall> parts_of(const Call& call, const Spread& spread) const {
    std::vector<RankCall> parts;
    for (int rank = 0; rank < spread.num_ranks; ++rank) {
      parts.emplace_back(call, spread, rank);
      parts.back().options.attention.run.backend = GetParam();
      parts.back().options.attention.run.num_threads = 1;
    }
    return parts;
  }
  static std::vector<std::exception_ptr> run_parts(std::vector<RankCall>& parts,
                                                   const Silence& silence = {}) {
    return on_ranks(
        static_cast<int>(parts.size()),
        [&](ContextParallel& ranks) { parts[static_cast<std::size_t>(ranks.rank())].run(ranks); },
        silence);
  }
  static std::string what(const std::exception_ptr& thrown) {
    if (!thrown) return "nothing";
    try {
      std::rethrow_exception(thrown);
    } catch (const PeerError& error) {
      return std::string("PeerError ") + static_cast<const Error&>(error).what();
    } catch (const Error& error) {
      return error.what();
    } catch (const std::exception& error) {
      return error.what();
    } catch (const FellSilent&) {
      return "fell silent";
    }
  }
  void expect_spread_right(const Call& call, const Spread& spread) const {
    SCOPED_TRACE(testing::Message() << spread);
    std::vector<RankCall> parts = parts_of(call, spread);
    for (const std::exception_ptr& thrown : run_parts(parts)) EXPECT_EQ(what(thrown), "nothing");
    if (HasFailure()) return;
    const Outputs got = gathered(call, spread, parts);
    if (spread.order == MergeOrder::kOrdered) {
      EXPECT_TRUE(got.bytes() == run(call).bytes()) << "not the bits of one process";
    } else {
      expect_right(call, got, all_rows(call.q));
    }
  }
  /// Two ranks with a split each.
  Spread halves(const Call& call) const {
    const std::int64_t split = split_len(call);
    return {.num_ranks = 2,
            .kv_lens = {split, call.k.sizes[2] - split},
            .q_lens = {call.q.sizes[2], 0}};
  }
};
KEYFOLD_FOR_EACH_BACKEND(Ranks);

TEST_P(Ranks, AnyShareOfAnyCallIsRight) {
  Rng rng("ranks");
  for (int n = 0; n < by_scale(10, 60, 250) && !HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = 2,
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 40),
           .kv_len = rng.between(0, 6000),
           .head_dim = rng.pick<std::int64_t>({7, 32})};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(4)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(4)) c.softcap = 5;
    if (rng.one_in(3)) c.mask = rng.one_in(2) ? Mask::kAdditive : Mask::kBool;
    c.mask_broadcast = {rng.one_in(2), rng.one_in(2), rng.one_in(2), false};
    c.sinks = rng.one_in(2);
    if (rng.one_in(3))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    c.data = rng.pick<Data>({Data::kNormal, Data::kOutliers, Data::kAscending, Data::kNeedle});
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    expect_spread_right(call,
                        Spread::random(rng, call, rng.pick<int>({1, 2, 3, 4, 8}), split_len(call)));
  }
}

TEST_P(Ranks, ManyKeysInShares) {
  Rng rng("many");
  const Inputs inputs({.num_heads = 2,
                       .q_len = by_scale<std::int64_t>(4, 24, 64),
                       .kv_len = by_scale<std::int64_t>(5000, 40'000, 131'072 + 77),
                       .head_dim = 16,
                       .causal = true,
                       .sinks = true},
                      rng);
  const Call call = inputs.call();
  for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered})
    for (const Queries queries : {Queries::kReplicated, Queries::kOwn}) {
      Spread spread = Spread::random(rng, call, 4, split_len(call));
      spread.order = order;
      spread.queries = queries;
      spread.block_bytes = 2000;
      expect_spread_right(call, spread);
    }
}

TEST_P(Ranks, RowsThatDoNotFitInScratchTakeSeveralPasses) {
  Rng rng("passes");
  const Inputs inputs(
      {.num_heads = 4, .num_kv_heads = 2, .q_len = 60, .kv_len = 3000, .causal = true}, rng);
  const Call call = inputs.call();
  Spread spread = Spread::random(rng, call, 3, split_len(call));
  spread.queries = Queries::kOwn;
  spread.order = MergeOrder::kOrdered;
  spread.row_stripe_len = 0;
  spread.q_lens = {4, 0, 56};
  std::vector<RankCall> parts = parts_of(call, spread);
  RunOptions one_thread;
  one_thread.num_threads = 1;
  const std::int64_t enough = plan_of(call.rows(0, 56), one_thread).scratch_bytes;
  for (RankCall& part : parts) part.options.attention.run.max_scratch_bytes = enough - 1;
  for (const std::exception_ptr& thrown : run_parts(parts)) EXPECT_EQ(what(thrown), "nothing");
  EXPECT_TRUE(gathered(call, spread, parts).bytes() == run(call).bytes());
}

TEST_P(Ranks, InfAndNaNStayWhereTheyBelong) {
  Rng rng("special");
  Inputs inputs({.q_len = 6, .kv_len = 3 * split_len(DType::kFloat32, 6), .head_dim = 16}, rng);
  const std::int64_t last = inputs.c.kv_len - 1;
  inputs.q.set({0, 0, 1, 3}, kNaN);
  inputs.k.set({0, 0, 5, 0}, kInf);  // scores of +Inf and -Inf
  inputs.v.set({0, 0, last, 2}, kInf);
  inputs.v.set({0, 0, 700, 4}, kNaN);
  const Call call = inputs.call();
  for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered}) {
    Spread spread = Spread::random(rng, call, 3, split_len(call));
    spread.order = order;
    expect_spread_right(call, spread);
  }
}

TEST_P(Ranks, DisagreementIsNamedOnAll) {
  Rng rng("disagree");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16, .sinks = true}, rng);
  const Call call = inputs.call();
  const float other_sinks[] = {7, 8};
  const std::vector<std::pair<std::string, std::function<void(RankCall&)>>> wrongs = {
      {"scale: expected the same on all ranks, got none on rank 0 and 0.5 on rank 1",
       [](RankCall& part) { part.options.attention.scale = 0.5f; }},
      {"causal: ", [](RankCall& part) { part.options.attention.causal = true; }},
      {"order: ", [](RankCall& part) { part.options.order = MergeOrder::kOrdered; }},
      {"queries: ", [](RankCall& part) { part.options.queries = Queries::kOwn; }},
      {"block_bytes: ", [](RankCall& part) { part.options.block_bytes = 5; }},
      {"sinks: ",
       [&](RankCall& part) {
         part.options.attention.sinks = TensorView(other_sinks, DType::kFloat32, {1, 2, 1, 1});
       }},
      {"q_len: ",
       [](RankCall& part) {
         part.q.sizes[2] = 2;
         part.out = Tensor(part.q.dtype, {1, 2, 2, 16});
         part.out.poison();
         part.options.attention.lse.reset();
       }},
  };
  for (const auto& [message, spoil] : wrongs) {
    std::vector<RankCall> parts = parts_of(call, halves(call));
    spoil(parts[1]);
    for (const std::exception_ptr& thrown : run_parts(parts))
      EXPECT_EQ(what(thrown).substr(0, message.size()), message) << what(thrown);
    for (const RankCall& part : parts) EXPECT_TRUE(part.untouched());
  }
}

TEST_P(Ranks, SharesThatDoNotFitAreNamed) {
  Rng rng("misfit");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  Spread spread = halves(call);
  spread.kv_lens = {1000 + split_len(call) / 2 - 1000 % split_len(call), 0};
  spread.kv_lens[1] = 3000 - spread.kv_lens[0];
  std::vector<RankCall> parts = parts_of(call, spread);
  std::vector<std::exception_ptr> thrown = run_parts(parts);
  EXPECT_EQ(what(thrown[0]).substr(0, 26), "PeerError rank 1 failed: k") << what(thrown[0]);
  EXPECT_EQ(what(thrown[1]).substr(0, 27), "k: expected keys from a mul") << what(thrown[1]);
  parts = parts_of(call, halves(call));
  for (RankCall& part : parts) part.options.stripe_len = split_len(call);
  thrown = run_parts(parts);
  for (const std::exception_ptr& it : thrown)
    EXPECT_NE(what(it).find("its stripes of"), std::string::npos) << what(it);
}

TEST_P(Ranks, AFailureReachesAllAndTheNextCallWorks) {
  Rng rng("failure");
  const Inputs inputs(
      {.num_heads = 4, .num_kv_heads = 2, .q_len = 40, .kv_len = 5000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  const Outputs expected = run(call);
  for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered})
    for (const Queries queries : {Queries::kReplicated, Queries::kOwn})
      for (const bool early : {true, false}) {
        Spread spread{.num_ranks = 3,
                      .queries = queries,
                      .order = order,
                      .block_bytes = 3000,
                      .kv_lens = {2 * split_len(call), 0, 5000 - 2 * split_len(call)},
                      .q_lens = {20, 19, 1}};
        std::vector<RankCall> good = parts_of(call, spread), bad = parts_of(call, spread);
        SCOPED_TRACE(testing::Message() << spread);
        int dispatches = 0;
        if (early) {
          bad[2].options.attention.scale = kNaN;
          for (RankCall& part : bad) part.options.attention.scale = kNaN;
          bad[2].q.data = nullptr;
        } else {
          bad[2].options.attention.run.progress = [&](const Progress&) {
            if (++dispatches == 3) throw std::runtime_error("enough");
          };
        }
        std::vector<std::exception_ptr> first(3);
        const auto thrown = on_ranks(3, [&](ContextParallel& ranks) {
          const auto rank = static_cast<std::size_t>(ranks.rank());
          try {
            bad[rank].run(ranks);
          } catch (...) {
            first[rank] = std::current_exception();
          }
          good[rank].run(ranks);
        });
        for (const std::exception_ptr& it : thrown) EXPECT_EQ(what(it), "nothing");
        const std::string own = early ? "q: expected data" : "enough";
        EXPECT_EQ(what(first[2]).substr(0, own.size()), own);
        for (const std::size_t rank : {std::size_t{0}, std::size_t{1}})
          EXPECT_EQ(what(first[rank]).substr(0, 25 + own.size()), "PeerError rank 2 failed: " + own)
              << what(first[rank]);
        for (const RankCall& part : bad) EXPECT_TRUE(part.untouched());
        if (order == MergeOrder::kOrdered)
          EXPECT_TRUE(gathered(call, spread, good).bytes() == expected.bytes());
        else
          expect_right(call, gathered(call, spread, good), all_rows(call.q));
      }
}

TEST_P(Ranks, SinksThatCannotBeReadAreNamed) {
  Rng rng("sinks");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16, .sinks = true}, rng);
  const Call call = inputs.call();
  std::vector<RankCall> parts = parts_of(call, halves(call));
  parts[1].options.attention.sinks->device = {DeviceType::kCuda, 0};
  parts[1].options.attention.sinks->data = reinterpret_cast<const void*>(64);  // of no host memory
  const std::vector<std::exception_ptr> thrown = run_parts(parts);
  EXPECT_EQ(what(thrown[0]).substr(0, 30), "PeerError rank 1 failed: sinks") << what(thrown[0]);
  EXPECT_EQ(what(thrown[1]).substr(0, 6), "sinks:") << what(thrown[1]);
}

TEST_P(Ranks, ACancelledRankEndsAll) {
  Rng rng("cancel");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  std::vector<RankCall> parts = parts_of(call, halves(call));
  std::stop_source stop;
  stop.request_stop();
  parts[0].options.attention.run.stop_token = stop.get_token();
  const std::vector<std::exception_ptr> thrown = run_parts(parts);
  EXPECT_THROW(std::rethrow_exception(thrown[0]), Cancelled);
  EXPECT_EQ(what(thrown[1]).substr(0, 34), "PeerError rank 0 failed: cancelled") << what(thrown[1]);
}

TEST_P(Ranks, ASilentRankIsFoundOutInBoundedTime) {
  Rng rng("silence");
  const Inputs inputs(
      {.num_heads = 4, .num_kv_heads = 2, .q_len = 40, .kv_len = 5000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered})
    for (const int after : by_scale<std::vector<int>>({0, 3}, {0, 3}, {0, 1, 2, 3, 5, 8})) {
      const Spread spread{.num_ranks = 3,
                          .queries = after % 2 ? Queries::kOwn : Queries::kReplicated,
                          .order = order,
                          .block_bytes = 3000,
                          .kv_lens = {split_len(call), split_len(call), 5000 - 2 * split_len(call)},
                          .q_lens = {20, 19, 1}};
      SCOPED_TRACE(testing::Message() << spread << ", after " << after);
      std::vector<RankCall> parts = parts_of(call, spread);
      for (RankCall& part : parts) part.options.timeout_seconds = 0.5;
      const auto start = std::chrono::steady_clock::now();
      std::vector<std::exception_ptr> again(3);
      const auto thrown = on_ranks(3,
                                   [&](ContextParallel& ranks) {
                                     const auto rank = static_cast<std::size_t>(ranks.rank());
                                     try {
                                       parts[rank].run(ranks);
                                     } catch (const PeerError& error) {
                                       EXPECT_EQ(error.ranks(), std::vector{1})
                                           << static_cast<const Error&>(error).what();
                                       try {
                                         parts[rank].run(ranks);
                                       } catch (...) {
                                         again[rank] = std::current_exception();
                                       }
                                       throw;
                                     }
                                   },
                                   {.rank = 1, .after = after});
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      EXPECT_LT(took.count(), 30);  // by far more than 0.5 s and 1 s for signs of life
      EXPECT_EQ(what(thrown[1]), "fell silent");
      for (const std::size_t rank : {std::size_t{0}, std::size_t{2}}) {
        EXPECT_NE(what(thrown[rank]).find("no answer from rank 1."), std::string::npos)
            << what(thrown[rank]);
        EXPECT_EQ(what(again[rank]).substr(0, 6), "ranks:") << "a broken object goes on";
        EXPECT_TRUE(parts[rank].untouched());
      }
    }
}

TEST_P(Ranks, ARequestThatThrowsEndsTheCall) {
  Rng rng("throw");
  const Inputs inputs(
      {.num_heads = 4, .num_kv_heads = 2, .q_len = 40, .kv_len = 5000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered})
    for (const int after : by_scale<std::vector<int>>({3}, {0, 3}, {0, 2, 3, 7})) {
      const Spread spread{.num_ranks = 3,
                          .queries = Queries::kOwn,
                          .order = order,
                          .block_bytes = 3000,
                          .kv_lens = {split_len(call), split_len(call), 5000 - 2 * split_len(call)},
                          .q_lens = {20, 19, 1}};
      SCOPED_TRACE(testing::Message() << spread << ", after " << after);
      std::vector<RankCall> parts = parts_of(call, spread);
      for (RankCall& part : parts) part.options.timeout_seconds = 0.5;
      const auto thrown = run_parts(parts, {.rank = 1, .after = after, .in_done = true});
      EXPECT_EQ(what(thrown[1]), "fell silent");
      for (const std::size_t rank : {std::size_t{0}, std::size_t{2}})
        EXPECT_EQ(what(thrown[rank]).substr(0, 9), "PeerError") << what(thrown[rank]);
      for (const RankCall& part : parts) EXPECT_TRUE(part.untouched());
    }
}

TEST_P(Ranks, ARankThatCannotMakeTheCallTellsTheOthers) {
  Rng rng("fail");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  std::vector<RankCall> parts = parts_of(call, halves(call));
  const auto thrown = on_ranks(2, [&](ContextParallel& ranks) {
    RankCall& part = parts[static_cast<std::size_t>(ranks.rank())];
    try {
      if (ranks.rank() == 1)
        ranks.fail(std::make_exception_ptr(std::runtime_error("no keys on this disk")));
      else
        part.run(ranks);
      ADD_FAILURE() << "nothing was thrown";
    } catch (const PeerError& error) {
      EXPECT_EQ(error.ranks(), std::vector{1});
      EXPECT_STREQ(static_cast<const Error&>(error).what(), "rank 1 failed: no keys on this disk");
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "no keys on this disk");
    }
    EXPECT_TRUE(part.untouched());
    part.run(ranks);
  });
  for (const std::exception_ptr& it : thrown) EXPECT_EQ(what(it), "nothing");
}

TEST_P(Ranks, ProgressGoesToTheEnd) {
  Rng rng("progress");
  const Inputs inputs({.q_len = 40, .kv_len = 5000, .head_dim = 16, .causal = true}, rng);
  const Call call = inputs.call();
  for (const Queries queries : {Queries::kReplicated, Queries::kOwn}) {
    Spread spread = halves(call);
    spread.queries = queries;
    spread.block_bytes = 1000;
    std::vector<RankCall> parts = parts_of(call, spread);
    std::vector<double> seen;
    parts[0].options.attention.run.progress = [&](const Progress& now) {
      seen.push_back(now.fraction);
    };
    for (const std::exception_ptr& thrown : run_parts(parts)) EXPECT_EQ(what(thrown), "nothing");
    ASSERT_FALSE(seen.empty());
    EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
    EXPECT_NEAR(seen.back(), 1, 1e-9);
  }
}

TEST(ShardKeys, CoversAllOnceInWholeSplits) {
  Rng rng("shards");
  for (int n = 0; n < 500; ++n) {
    const std::int64_t split = rng.between(1, 9), kv_len = rng.between(0, 400);
    const auto num_ranks = static_cast<int>(rng.between(1, 9));
    const std::int64_t stripe = rng.one_in(2) ? 0 : split * rng.between(1, 4);
    std::vector<KeySpan> all;
    std::vector<std::int64_t> counts;
    for (int rank = 0; rank < num_ranks; ++rank) {
      counts.push_back(0);
      for (const KeySpan& span : shard_keys(kv_len, num_ranks, rank, split, stripe)) {
        EXPECT_LT(span.begin, span.end);
        EXPECT_EQ(span.begin % split, 0);
        all.push_back(span);
        counts.back() += span.end - span.begin;
      }
    }
    std::sort(all.begin(), all.end(),
              [](const KeySpan& a, const KeySpan& b) { return a.begin < b.begin; });
    std::int64_t next = 0;
    for (const KeySpan& span : all) {
      EXPECT_EQ(span.begin, next);
      next = span.end;
    }
    EXPECT_EQ(next, kv_len);
    const auto [least, most] = std::minmax_element(counts.begin(), counts.end());
    EXPECT_LE(*most - *least, 2 * std::max(split, stripe));
  }
  EXPECT_EQ(shard_rows(20, 2, 0, 5), (std::vector<KeySpan>{{0, 5}, {15, 20}}));
  EXPECT_EQ(shard_rows(24, 2, 1, 5), (std::vector<KeySpan>{{5, 10}, {10, 15}}));
  EXPECT_EQ(shard_rows(24, 2, 0, 5), (std::vector<KeySpan>{{0, 5}, {15, 20}, {20, 24}}));
  EXPECT_THROW(shard_rows(100, 2, 2, 10), InvalidArgument);
  EXPECT_THROW(shard_rows(100, 2, 0, 0), InvalidArgument);
  EXPECT_THROW(shard_keys(100, 2, 2, 10), InvalidArgument);
  EXPECT_THROW(shard_keys(100, 2, 0, 10, 15), InvalidArgument);
  EXPECT_THROW(shard_keys(-1, 2, 0, 10), InvalidArgument);
}

}  // namespace
}  // namespace keyfold::test

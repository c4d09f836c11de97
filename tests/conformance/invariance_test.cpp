// The promises I1 to I5, bit by bit: chunks, budgets, row blocks, threads, batch, runs, decode.
#include <algorithm>
#include <limits>
#include <thread>

#include "support/backends.hpp"

namespace keyfold::test {
namespace {

Case random_case(Rng& rng) {
  const std::int64_t kv_heads = rng.between(1, 2), longest = by_scale(700, 2500, 6000);
  Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
         .batch = rng.between(1, 4),
         .num_heads = kv_heads * rng.pick<std::int64_t>({1, 2, 4, 7}),
         .num_kv_heads = kv_heads,
         .q_len = rng.one_in(3) ? 1 : rng.between(1, 50),
         .kv_len = rng.between(1, longest),
         .head_dim = rng.pick<std::int64_t>({5, 16, 33, 64, 128})};
  c.causal = rng.one_in(2);
  if (rng.one_in(3)) c.window.left = rng.between(0, c.kv_len);
  if (rng.one_in(4)) c.window.right = rng.between(0, c.kv_len);
  if (rng.one_in(3)) c.softcap = 4.0f;
  if (rng.one_in(3)) c.mask = rng.pick<Mask>({Mask::kBool, Mask::kAdditive});
  c.sinks = rng.one_in(3);
  if (rng.one_in(3))
    for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
  c.data = rng.pick<Data>({Data::kNormal, Data::kOutliers, Data::kAscending});
  return c;
}

class Invariance : public BackendTest {
 protected:
  /// Random ways to run that may not change a bit.
  RunOptions random_way(const Call& call, Rng& rng) const {
    RunOptions how;
    if (rng.one_in(2)) how.chunk_size = rng.between(1, call.k.sizes[2]);
    if (rng.one_in(2)) how.budget_ms = rng.one_in(2) ? 0.1 : 1000.0;
    if (rng.one_in(3)) how.chunk_threshold = rng.between(0, 2 * call.k.sizes[2]);
    how.num_threads = static_cast<int>(rng.between(1, 5));
    if (rng.one_in(2)) {
      const std::int64_t all = plan_of(call, how).scratch_bytes;
      how.max_scratch_bytes = std::max(least_scratch(call, how), rng.between(all / 8, all));
    }
    return how;
  }

  /// The smallest scratch that is accepted, as the error for less of it says.
  std::int64_t least_scratch(const Call& call, RunOptions how) const {
    how.max_scratch_bytes = 1;
    try {
      plan_of(call, how);
      return 1;
    } catch (const InvalidArgument& e) {
      const std::string message = static_cast<const Error&>(e).what();
      return std::stoll(message.substr(message.find("at least ") + 9));
    }
  }

  /// Runs `test` on random cases.
  template <class Test>
  void for_random_cases(const char* label, int count, const Test& test) const {
    Rng rng(label);
    for (int n = 0; n < count && !HasFailure(); ++n) {
      const Case c = random_case(rng);
      SCOPED_TRACE(testing::Message() << c);
      const Inputs inputs(c, rng);
      test(inputs.call(), rng);
    }
  }
};
KEYFOLD_FOR_EACH_BACKEND(Invariance);

/// Bytes of rows [begin, end) of batch entry `b` of a whole result.
std::vector<std::byte> part(const Outputs& whole, std::int64_t b, std::int64_t begin,
                            std::int64_t end) {
  std::vector<std::byte> result;
  for (const Tensor* t : {&whole.out, &whole.lse}) {
    Dims sizes = t->sizes();
    sizes[0] = 1;
    sizes[2] = end - begin;
    Tensor some(t->dtype(), sizes);
    some.each([&](const Dims& i) { some.set(i, t->at({b, i[1], begin + i[2], i[3]})); });
    const std::vector<std::byte> bytes = some.bytes();
    result.insert(result.end(), bytes.begin(), bytes.end());
  }
  return result;
}

TEST_P(Invariance, I1I2ChunksBudgetsBlocksAndThreads) {
  for_random_cases("I1", by_scale(6, 30, 100), [&](const Call& call, Rng& rng) {
    const std::vector<std::byte> expected = run(call).bytes();
    for (int n = 0; n < 6; ++n) {
      const RunOptions how = random_way(call, rng);
      SCOPED_TRACE(testing::Message()
                   << "chunk_size " << how.chunk_size.value_or(0) << " budget_ms "
                   << how.budget_ms.value_or(0) << " threshold " << how.chunk_threshold.value_or(0)
                   << " threads " << *how.num_threads << " scratch "
                   << how.max_scratch_bytes.value_or(0));
      ASSERT_TRUE(run(call, how).bytes() == expected);
    }
  });
}

TEST_P(Invariance, I1EveryChunkSizeAndEveryBlock) {
  Rng rng("every");
  const Inputs inputs({.num_heads = 4,
                       .num_kv_heads = 2,
                       .q_len = 33,
                       .kv_len = 5000,
                       .head_dim = 16,
                       .causal = true},
                      rng);
  const Call call = inputs.call();
  const std::vector<std::byte> expected = run(call).bytes();
  const std::int64_t split = split_len(call), all = plan_of(call).scratch_bytes;
  std::int64_t most_blocks = 1;
  for (std::int64_t splits = 1; splits * split < 5000 + split; ++splits) {
    RunOptions how;
    how.chunk_size = splits * split;
    ASSERT_TRUE(run(call, how).bytes() == expected);
    how.max_scratch_bytes = std::max(least_scratch(call, how), all / (splits + 1));
    const Outputs blocked = run(call, how);
    ASSERT_TRUE(blocked.bytes() == expected);
    EXPECT_LE(blocked.report.scratch_bytes, *how.max_scratch_bytes);
    most_blocks = std::max(most_blocks, plan_of(call, how).num_row_blocks);
  }
  EXPECT_GT(most_blocks, 1);
}

TEST_P(Invariance, I1TheLastRowsOfAPrefillAreFew) {
  // As few as a decode call has, where a block of rows ends; yet they are rows of a prefill call.
  Rng rng("few");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Inputs inputs(
        {.dtype = dtype, .q_len = 70, .kv_len = 700, .head_dim = 64, .causal = true}, rng);
    const Call call = inputs.call();
    const std::vector<std::byte> expected = run(call).bytes();
    const std::int64_t all = plan_of(call).scratch_bytes, least = least_scratch(call, {});
    const auto few = [&](const RunOptions& how) {
      const std::int64_t rows = plan_of(call, how).rows_per_block, left = 70 % rows;
      return rows > 8 && left > 0 && left <= 8;
    };
    RunOptions how;
    for (std::int64_t part = 64; part > 0 && !few(how); --part)
      how.max_scratch_bytes = least + (all - least) * part / 64;
    EXPECT_TRUE(few(how));
    EXPECT_TRUE(run(call, how).bytes() == expected);
  }
}

TEST_P(Invariance, I2ShortPrefillsOfSeveralGroups) {
  // Groups whose few keys are worked on together, as many as there is room for, by several threads.
  Rng rng("short");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t kv_len : {1, 16, 33, 65, 513}) {
      const Inputs inputs({.dtype = dtype,
                           .batch = 2,
                           .num_heads = 20,
                           .num_kv_heads = 10,
                           .q_len = 24,
                           .kv_len = kv_len,
                           .head_dim = 64,
                           .causal = true},
                          rng);
      const Call call = inputs.call();
      RunOptions how;
      how.num_threads = 1;
      const std::vector<std::byte> expected = run(call, how).bytes();
      for (const int threads : {2, 3, 5}) {
        how.num_threads = threads;
        ASSERT_TRUE(run(call, how).bytes() == expected) << kv_len << " keys";
      }
      how.max_scratch_bytes = least_scratch(call, how);
      ASSERT_TRUE(run(call, how).bytes() == expected) << kv_len << " keys, row by row";
    }
  }
}

TEST_P(Invariance, I3ABatchEntryAlone) {
  for_random_cases("I3", by_scale(6, 30, 100), [&](const Call& call, Rng& rng) {
    const Outputs whole = run(call);
    for (std::int64_t b = 0; b < call.q.sizes[0]; ++b)
      ASSERT_TRUE(run(call.batch_entry(b), random_way(call, rng)).bytes() ==
                  part(whole, b, 0, call.q.sizes[2]))
          << "entry " << b;
  });
}

TEST_P(Invariance, I3EveryPositionInABatch) {
  Rng rng("positions");
  for (const std::int64_t q_len : {1, 40}) {
    Inputs inputs({.batch = 4,
                   .num_heads = 4,
                   .num_kv_heads = 2,
                   .q_len = q_len,
                   .kv_len = 900,
                   .head_dim = 32},
                  rng);
    const std::vector<std::byte> alone = run(inputs.call().batch_entry(0)).bytes();
    const auto copy = [](Tensor& t, std::int64_t to) {
      t.each([&](const Dims& i) {
        if (i[0] == to) t.set(i, t.at({0, i[1], i[2], i[3]}));
      });
    };
    for (std::int64_t b = 1; b < 4; ++b) {
      for (Tensor* t : {&inputs.q, &inputs.k, &inputs.v}) copy(*t, b);
      EXPECT_TRUE(part(run(inputs.call()), b, 0, q_len) == alone) << "position " << b;
    }
  }
}

TEST_P(Invariance, I3AmongMoreRowsThanADeviceHolds) {
  // Which it may share out in other ways than those of one entry: by parts of the keys, too.
  Rng rng("many rows");
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    Inputs inputs({.dtype = dtype,
                   .batch = 24,
                   .num_heads = 1,
                   .num_kv_heads = 1,
                   .q_len = 1100,
                   .kv_len = by_scale(500, 1700, 3400),
                   .head_dim = by_scale(16, 64, 64)},
                  rng);
    inputs.v.set({3, 0, 100, 5}, std::numeric_limits<float>::infinity());
    const Call call = inputs.call();
    const Outputs whole = run(call);
    for (const std::int64_t b : {0, 3, 11, 23}) {
      EXPECT_TRUE(run(call.batch_entry(b)).bytes() == part(whole, b, 0, call.q.sizes[2]))
          << "entry " << b;
    }
  }
}

TEST_P(Invariance, I4FromRunToRun) {
  for_random_cases("I4", by_scale(4, 10, 30), [&](const Call& call, Rng&) {
    const std::vector<std::byte> expected = run(call).bytes();
    for (int n = 0; n < 4; ++n) ASSERT_TRUE(run(call).bytes() == expected);
  });
}

TEST_P(Invariance, I4FromSeveralThreadsAtOnce) {
  for_random_cases("at once", by_scale(2, 6, 20), [&](const Call& call, Rng&) {
    const std::vector<std::byte> expected = run(call).bytes();
    std::vector<std::vector<std::byte>> got(4);
    std::vector<std::thread> threads;
    for (auto& g : got) threads.emplace_back([&] { g = run(call).bytes(); });
    for (auto& t : threads) t.join();
    for (const auto& g : got) ASSERT_TRUE(g == expected);
  });
}

TEST_P(Invariance, I5RowsOfAPrefillAsDecodeCalls) {
  if (!decode_as_prefill()) GTEST_SKIP() << GetParam() << " does not promise I5";
  for_random_cases("I5", by_scale(6, 30, 100), [&](const Call& call, Rng& rng) {
    const Call one = call.batch_entry(0);
    const std::int64_t rows = one.q.sizes[2];
    const Outputs whole = run(one);
    for (int n = 0; n < 4; ++n) {
      const std::int64_t row = rng.between(0, rows - 1);
      ASSERT_TRUE(run(one.rows(row, row + 1)).bytes() == part(whole, 0, row, row + 1))
          << "row " << row;
      const std::int64_t end = rng.between(row + 1, rows);
      ASSERT_TRUE(run(one.rows(row, end)).bytes() == part(whole, 0, row, end))
          << "rows " << row << " to " << end;
    }
  });
}

TEST_P(Invariance, I5AGrowingCache) {
  if (!decode_as_prefill()) GTEST_SKIP() << GetParam() << " does not promise I5";
  // Token by token over a cache of fixed size, as generation does, against one causal prefill.
  Rng rng("cache");
  const std::int64_t len = by_scale(40, 300, 1100);
  const Inputs inputs({.dtype = DType::kBFloat16,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .q_len = len,
                       .kv_len = len,
                       .head_dim = 32,
                       .causal = true},
                      rng);
  const Call call = inputs.call();
  const Outputs whole = run(call);
  for (std::int64_t row = 0; row < len; row += 1 + row / 20) {
    const std::int64_t keys[1] = {row + 1};
    Call step = call.rows(row, row + 1);
    step.options.q_offset.reset();
    step.options.kv_lens = keys;
    ASSERT_TRUE(run(step).bytes() == part(whole, 0, row, row + 1)) << "row " << row;
  }
}

}  // namespace
}  // namespace keyfold::test

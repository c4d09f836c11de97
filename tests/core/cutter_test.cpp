// Cutting: every visible pair once, in ascending order per row, on split boundaries, within the
// work that was asked for; blocks within the scratch that was allowed.
#include <gtest/gtest.h>

#include <sstream>

#include "core/plan.hpp"
#include "core/scripted_backend.hpp"
#include "support/random.hpp"

namespace keyfold::core {
namespace {

using test::FoldCheck;
using test::Rng;

struct RandomProblem {
  AttentionShape shape;
  AttentionOptions options;
  std::vector<std::int64_t> kv_lens;
  Problem problem;

  explicit RandomProblem(Rng& rng) {
    const std::int64_t kv_heads = rng.between(1, 4);
    shape = {.batch = rng.between(1, 3),
             .num_heads = kv_heads * rng.between(1, 4),
             .num_kv_heads = kv_heads,
             .q_len = rng.one_in(3) ? 1 : rng.between(1, 150),
             .kv_len = rng.one_in(4) ? rng.between(0, 3) : rng.between(1, 2000),
             .head_dim = 8,
             .value_dim = 16,
             .dtype = DType::kFloat32};
    options.causal = rng.one_in(2);
    if (rng.one_in(2)) options.window.left = rng.between(0, shape.kv_len);
    if (rng.one_in(3)) options.window.right = rng.between(0, shape.kv_len);
    if (rng.one_in(4)) options.q_offset = rng.between(-2 * shape.q_len, 2 * shape.kv_len);
    if (rng.one_in(2)) {
      for (std::int64_t b = 0; b < shape.batch; ++b)
        kv_lens.push_back(rng.between(0, shape.kv_len));
      options.kv_lens = kv_lens;
    }
    problem = make_problem(shape, nullptr, options);
  }
};

std::string describe(const ChunkBox& b) {
  std::ostringstream text;
  text << "groups " << b.group_begin << "-" << b.group_end << " rows " << b.row_begin << "-"
       << b.row_end << " keys " << b.key_begin << "-" << b.key_end;
  return text.str();
}

Block random_block(const Problem& p, Rng& rng) {
  Block block{0, p.num_groups(), 0, p.shape.q_len};
  if (rng.one_in(2)) {
    block.group_begin = rng.between(0, p.num_groups() - 1);
    block.group_end = rng.between(block.group_begin + 1, p.num_groups());
  }
  if (rng.one_in(2)) {
    block.row_begin = rng.between(0, p.shape.q_len - 1);
    block.row_end = rng.between(block.row_begin + 1, p.shape.q_len);
  }
  return block;
}

TEST(ChunkCutter, CoversEveryVisiblePairOnceInAscendingOrder) {
  Rng rng("cutter");
  const int rounds = test::by_scale(100, 1000, 5000);
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const RandomProblem random(rng);
    const Problem& p = random.problem;
    const Block block = random_block(p, rng);
    CutRule rule{.split_len = std::int64_t{1} << rng.between(0, 8),
                 .row_align = std::int64_t{1} << rng.between(0, 5)};
    if (rng.one_in(3)) rule.chunk_keys = rule.split_len * rng.between(1, 5);
    rule.whole = rng.one_in(8);
    if (rng.one_in(4)) rule.max_keys = rule.split_len * rng.between(1, 4);
    const KeyRange keys{0, p.shape.kv_len};
    FoldCheck fold(p, block, keys, rule.split_len);
    ChunkCutter cutter(p, block, keys, rule);
    const double base = 1e3 * static_cast<double>(rng.between(1, 5000));
    double pairs = 0;
    int chunks = 0;
    for (;;) {
      const double max_flops = base * (rng.one_in(5) ? 0.1 : 1.0);
      const auto chunk = cutter.next(max_flops);
      if (!chunk) break;
      const ChunkBox& box = chunk->box;
      SCOPED_TRACE(describe(box));
      fold.fold(box);
      ASSERT_GT(chunk->flops, 0);
      ASSERT_EQ(chunk->flops, p.visible_pairs(box) * p.flops_per_pair());
      ASSERT_EQ((box.row_begin - block.row_begin) % rule.row_align, 0);
      ASSERT_TRUE(rule.chunk_keys == 0 || rule.whole ||
                  box.key_end - box.key_begin <= rule.chunk_keys);
      ASSERT_LE(box.key_end - box.key_begin, rule.max_keys);
      pairs += p.visible_pairs(box);
      ++chunks;
      if (!chunk->sole) continue;
      ASSERT_EQ(chunks, 1);
      ASSERT_FALSE(cutter.next(max_flops));
      ASSERT_EQ(box.row_end - box.row_begin, block.row_end - block.row_begin);
      ASSERT_EQ(box.group_end - box.group_begin, block.group_end - block.group_begin);
    }
    EXPECT_TRUE(fold.complete());
    EXPECT_EQ(pairs, p.visible_pairs({block.group_begin, block.group_end, block.row_begin,
                                      block.row_end, 0, p.shape.kv_len}));
    EXPECT_TRUE(!rule.whole || chunks <= 1 || rule.max_keys < p.shape.kv_len);
  }
}

TEST(ChunkCutter, SoleIsWhatHoldsAllOfACall) {
  const AttentionShape shape{.num_heads = 2, .num_kv_heads = 2, .q_len = 5, .kv_len = 100};
  const Block all{0, 2, 0, 5};
  const CutRule rule{.split_len = 16};
  const auto first_of = [&](const Problem& p, KeyRange keys, double flops) {
    return ChunkCutter(p, all, keys, rule).next(flops);
  };
  const Problem p = make_problem(shape, nullptr, {});
  EXPECT_TRUE(first_of(p, {0, 100}, 1e12)->sole);
  EXPECT_FALSE(first_of(p, {0, 100}, 1e3)->sole);
  EXPECT_FALSE(first_of(p, {0, 96}, 1e12)->sole);    // more may follow
  EXPECT_FALSE(first_of(p, {16, 100}, 1e12)->sole);  // something came before
  AttentionShape stream = shape;
  stream.kv_len = kUnknownLength;
  AttentionOptions options;
  options.q_offset = 0;
  EXPECT_FALSE(first_of(make_problem(stream, nullptr, options), {0, 100}, 1e12)->sole);
  // Rows that see no key are in no chunk.
  options.causal = true;
  options.q_offset = -2;
  EXPECT_FALSE(first_of(make_problem(shape, nullptr, options), {0, 100}, 1e12)->sole);
}

TEST(ChunkCutter, AChunkHoldsNoMoreWorkThanAllowed) {
  Rng rng("cutter work");
  const int rounds = test::by_scale(100, 1000, 5000);
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const RandomProblem random(rng);
    const Problem& p = random.problem;
    const CutRule rule{.split_len = std::int64_t{1} << rng.between(4, 8),
                       .row_align = std::int64_t{1} << rng.between(0, 5)};
    const Block block = random_block(p, rng);
    ChunkCutter cutter(p, block, {0, p.shape.kv_len}, rule);
    const double max_flops = 1e3 * static_cast<double>(rng.between(1, 20000));
    while (const auto chunk = cutter.next(max_flops)) {
      const ChunkBox& box = chunk->box;
      const bool smallest = box.group_end - box.group_begin == 1 &&
                            box.row_end - box.row_begin <= rule.row_align &&
                            box.key_end - box.key_begin <= rule.split_len;
      ASSERT_TRUE(chunk->flops <= max_flops || smallest)
          << describe(box) << ": " << chunk->flops << " of " << max_flops << " flops, row_align "
          << rule.row_align << ", split_len " << rule.split_len;
    }
  }
}

TEST(ChunkCutter, KeepsToWorkThatShrinksInsideASweepAndCopiesGoOnAlike) {
  Rng rng("cutter shrinks");
  const int rounds = test::by_scale(100, 1000, 5000);
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const RandomProblem random(rng);
    const Problem& p = random.problem;
    CutRule rule{.split_len = std::int64_t{1} << rng.between(4, 6),
                 .row_align = std::int64_t{1} << rng.between(0, 5)};
    if (rng.one_in(3)) rule.chunk_keys = rule.split_len * rng.between(1, 5);
    rule.whole = rng.one_in(8);
    if (rng.one_in(4)) rule.max_keys = rule.split_len * rng.between(1, 4);
    const Block block = random_block(p, rng);
    const KeyRange keys{0, p.shape.kv_len};
    FoldCheck fold(p, block, keys, rule.split_len);
    ChunkCutter cutter(p, block, keys, rule);
    double max_flops = 1e7;
    bool obeys = rule.chunk_keys == 0 && !rule.whole;
    for (int n = 0;; ++n) {
      if (rng.one_in(3)) max_flops = 1e3 * static_cast<double>(rng.between(1, 20000));
      if (n == 2) {
        cutter.obey_work();
        obeys = true;
      }
      ChunkCutter copy = cutter;
      const auto chunk = cutter.next(max_flops), twin = copy.next(max_flops);
      ASSERT_EQ(chunk.has_value(), twin.has_value());
      if (!chunk) break;
      const ChunkBox& box = chunk->box;
      ASSERT_EQ(describe(box), describe(twin->box));
      if (rng.one_in(4)) cutter = copy;
      fold.fold(box);
      const bool smallest = box.group_end - box.group_begin == 1 &&
                            box.row_end - box.row_begin <= rule.row_align &&
                            box.key_end - box.key_begin <= rule.split_len;
      // Rows that were under way stay together, one split at a time.
      const bool under_way =
          box.key_end - box.key_begin <= rule.split_len && box.group_end - box.group_begin == 1;
      ASSERT_TRUE(!obeys || chunk->flops <= max_flops || smallest || under_way) << describe(box);
    }
    EXPECT_TRUE(fold.complete());
  }
}

TEST(ChunkCutter, CountsPairsAndRowsAsOneByOne) {
  Rng rng("pairs");
  for (int round = 0; round < 300; ++round) {
    const RandomProblem random(rng);
    const Problem& p = random.problem;
    const Block block = random_block(p, rng);
    KeyRange keys{rng.between(0, p.shape.kv_len), 0};
    keys.end = rng.between(keys.begin, p.shape.kv_len);
    double pairs = 0;
    KeyRange rows{block.row_end, block.row_begin};
    for (std::int64_t g = 0; g < p.num_groups(); ++g)
      for (std::int64_t i = block.row_begin; i < block.row_end; ++i)
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
          const KeyRange visible = p.visible(g / p.shape.num_kv_heads, i);
          if (j < visible.begin || j >= visible.end) continue;
          rows = {std::min(rows.begin, i), std::max(rows.end, i + 1)};
          if (g >= block.group_begin && g < block.group_end) pairs += 1;
        }
    EXPECT_EQ(p.visible_pairs({block.group_begin, block.group_end, block.row_begin, block.row_end,
                               keys.begin, keys.end}),
              pairs * static_cast<double>(p.group_size()));
    const KeyRange got = p.rows_seeing(keys, {block.row_begin, block.row_end});
    if (rows.size() > 0) {
      EXPECT_LE(got.begin, rows.begin);
      EXPECT_GE(got.end, rows.end);
    }
  }
}

TEST(PlanBlocks, CoverTheProblemWithinTheScratch) {
  Rng rng("blocks");
  test::ScriptedBackend& backend = test::ScriptedBackend::fresh();
  for (int round = 0; round < 500; ++round) {
    const RandomProblem random(rng);
    const Problem& p = random.problem;
    const std::int64_t least = backend.scratch_bytes(p, 1, 1, 1);
    const std::int64_t all = backend.scratch_bytes(p, p.num_groups(), p.shape.q_len, 1);
    const std::int64_t limit = rng.one_in(3) ? all : rng.between(least, all);
    const std::vector<Block> blocks = plan_blocks(p, backend, limit, 1, 0, p.shape.q_len);
    std::vector<int> times(static_cast<std::size_t>(p.num_groups() * p.shape.q_len));
    for (const Block& b : blocks) {
      EXPECT_LE(backend.scratch_bytes(p, b.group_end - b.group_begin, b.row_end - b.row_begin, 1),
                limit);
      for (std::int64_t g = b.group_begin; g < b.group_end; ++g)
        for (std::int64_t i = b.row_begin; i < b.row_end; ++i)
          ++times[static_cast<std::size_t>(g * p.shape.q_len + i)];
    }
    EXPECT_EQ(times, std::vector<int>(times.size(), 1));
    EXPECT_EQ(blocks.size() == 1, limit == all);
    try {
      plan_blocks(p, backend, least - 1, 1, 0, p.shape.q_len);
      FAIL() << "one row needs more than " << least - 1;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), "max_scratch_bytes");
      EXPECT_NE(std::string(e.std::invalid_argument::what()).find(std::to_string(least)),
                std::string::npos);
    }
  }
}

TEST(Plan, ScratchDoesNotDependOnKvLen) {
  test::ScriptedBackend::fresh();
  AttentionOptions options;
  options.run.backend = test::ScriptedBackend::kName;
  options.run.chunk_size = 1 << 20;
  AttentionShape shape{.batch = 2, .num_heads = 8, .num_kv_heads = 2, .q_len = 300};
  std::int64_t first = -1;
  for (const std::int64_t kv_len : {0, 1, 64, 100000, 1 << 30}) {
    shape.kv_len = kv_len;
    const Plan plan = keyfold::plan(shape, options);
    if (first < 0) first = plan.scratch_bytes;
    EXPECT_EQ(plan.scratch_bytes, first) << kv_len;
    EXPECT_GT(plan.scratch_bytes, 0);
  }
}

}  // namespace
}  // namespace keyfold::core

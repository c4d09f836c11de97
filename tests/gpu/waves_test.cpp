// Dispatches cover a submission's work once, within every limit.
#include "gpu/waves.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

namespace keyfold::gpu {
namespace {

/// Every group x index x split is in one wave.
void expect_covered(const Work& work, const std::vector<Wave>& waves) {
  std::int64_t sum = 0;
  std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> starts;
  for (const Wave& w : waves) {
    EXPECT_GT(w.num_groups, 0);
    EXPECT_LE(w.group + w.num_groups, work.groups);
    EXPECT_LE(w.index + w.num_indices, work.indices);
    EXPECT_LE(w.split + w.num_splits, work.splits);
    EXPECT_TRUE(starts.emplace(w.group, w.index, w.split).second);
    sum += w.num_groups * w.num_indices * w.num_splits;
  }
  EXPECT_EQ(sum, work.groups * work.indices * work.splits);
}

TEST(Waves, CoverTheWorkWithinTheLimits) {
  for (const std::int64_t groups : {1, 8, 70'000})
    for (const std::int64_t indices : {1, 4, 300, 9'000'000})
      for (const std::int64_t splits : {1, 7, 2'000})
        for (const std::int64_t max_groups : {1'000, 65'535})
          for (const bool decode : {false, true}) {
            const std::int64_t tile_rows = decode ? 4 : 128;
            if (groups * indices > 20'000'000) continue;
            const Work work{.groups = groups,
                            .indices = indices,
                            .splits = splits,
                            .tile_rows = tile_rows,
                            .max_groups = max_groups,
                            .partials = std::max<std::int64_t>(indices, 65'536),
                            .decode = decode};
            SCOPED_TRACE(testing::Message() << groups << " groups " << indices << " indices "
                                            << splits << " splits decode " << decode);
            const Waves cut = cut_chunk(work);
            expect_covered(work, cut.waves);
            std::int64_t split = 0;
            for (const Wave& w : cut.waves) {
              EXPECT_LE(w.num_groups, max_groups);
              EXPECT_LE(cut.direct ? 1 : w.num_splits, 65'535);
              if (cut.direct) {
                EXPECT_LE((w.num_indices + tile_rows - 1) / tile_rows, 65'535);
              } else {
                EXPECT_LE(w.num_groups * w.num_indices * w.num_splits, work.partials);
              }
              EXPECT_TRUE(w.split == 0 || w.split == split);  // ascending
              split = w.split + w.num_splits;
            }
          }
}

TEST(Waves, HoldWhatIsPrepared) {
  for (const std::int64_t groups : {1, 5, 300})
    for (const std::int64_t splits : {1, 7, 2'000})
      for (const std::int64_t prepared : {1, 64, 1'000}) {
        const Work work{.groups = groups,
                        .indices = 4'000,
                        .splits = splits,
                        .tile_rows = 128,
                        .max_groups = 65'535,
                        .prepared = prepared,
                        .folds = true};
        const Waves cut = cut_chunk(work);
        EXPECT_TRUE(cut.direct);
        expect_covered(work, cut.waves);
        for (const Wave& w : cut.waves) EXPECT_LE(w.num_groups * w.num_splits, prepared);

        Work shared = work;
        shared.shared = true;
        const Waves of_shared = cut_chunk(shared);
        expect_covered(shared, of_shared.waves);
        for (const Wave& w : of_shared.waves) {
          EXPECT_EQ(w.num_groups, groups);
          EXPECT_EQ(w.num_splits, std::min(prepared, splits - w.split));
        }
      }
}

TEST(Waves, MergesCoverTheStates) {
  for (const std::int64_t groups : {1, 3, 70'000})
    for (const std::int64_t indices : {1, 65'536, 9'000'000}) {
      if (groups * indices > 100'000'000) continue;
      const Work work{
          .groups = groups, .indices = indices, .splits = 1, .tile_rows = 1, .max_groups = 65'535};
      const std::vector<Wave> waves = cut_merge(work);
      expect_covered(work, waves);
      for (const Wave& w : waves) {
        EXPECT_LE(w.num_indices, 65'535);
        EXPECT_TRUE(w.num_groups == 1 || w.num_indices == indices);
      }
    }
}

TEST(Waves, FewRowsGoSideBySide) {
  Work work{.groups = 8,
            .indices = 256,
            .splits = 16,
            .tile_rows = 128,
            .max_groups = 65'535,
            .partials = 65'536};
  EXPECT_FALSE(cut_chunk(work).direct);
  work.indices = 32'768;
  EXPECT_TRUE(cut_chunk(work).direct);
}

/// Room for partial states of fewer workgroups than the rows have.
TEST(Waves, NoWaveIsSmallerThanTheRows) {
  Work work{.groups = 3,
            .indices = 8'192,
            .splits = 16,
            .tile_rows = 64,
            .max_groups = 65'535,
            .partials = 16'384};
  EXPECT_TRUE(cut_chunk(work).direct);
  work.partials *= 4;
  EXPECT_FALSE(cut_chunk(work).direct);
}

}  // namespace
}  // namespace keyfold::gpu

// One CPU run: folds chunks into the state of a block's rows on oneTBB threads.
#pragma once

#include <tbb/task_arena.h>

#include <deque>

#include "core/backend.hpp"
#include "cpu/workspace.hpp"

namespace keyfold::cpu {

/// Two schedules, the same bits. Many rows to a group: its splits are packed once, in parallel, and
/// shared by tasks of rows. Few rows (decode): tasks of splits, each packed by the thread that
/// reduces it; their partial states are then merged in ascending order.
class CpuRun : public core::Run {
 public:
  CpuRun(const core::Problem& problem, const core::Block& block, const Kernels& kernels,
         int num_threads);

  void submit(const core::Chunk& chunk, const core::KeySource& source) override;
  double wait() override;
  void merge(core::Run& other) override;
  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override;

 private:
  /// A split of a group: its keys as far as they exist and may be read.
  struct Split {
    std::int64_t group;
    core::KeyRange keys;
  };
  /// A query row of a group, by its number among the block's rows x query heads of the group.
  struct Row {
    std::int64_t batch, head, row;
  };

  Row row_at(std::int64_t group, std::int64_t index) const;
  RowState state_at(std::int64_t group, std::int64_t index) const;
  Split split_at(std::int64_t group, std::int64_t key, std::int64_t key_end) const;

  void fold_by_rows(const ChunkBox& box, const core::KeySource& source);
  void fold_by_splits(const ChunkBox& box, const core::KeySource& source);
  void pack_panel(const Split& split, std::int64_t panel, const core::KeySource& source,
                  std::int64_t slot) const;
  void pack_queries(std::int64_t group, std::int64_t begin, std::int64_t end, float* packed) const;
  /// Reduces rows [begin, end) of the split's group, at most row_tile, whose queries are packed at
  /// q. False if none of them sees a key of the split.
  bool reduce(const Split& split, std::int64_t begin, std::int64_t end, const float* q,
              std::int64_t slot, const ThreadSpace& space, const RowState& result) const;

  const core::Problem& problem_;
  core::Block block_;
  const Kernels& kernels_;
  tbb::task_arena arena_;
  Workspace workspace_;
  std::deque<double> seconds_;  // of submissions not waited for yet
};

}  // namespace keyfold::cpu

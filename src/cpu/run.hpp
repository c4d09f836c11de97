// One CPU run: folds chunks into the state of a block's rows on oneTBB threads.
#pragma once

#include <deque>
#include <functional>

#include "core/backend.hpp"
#include "core/saved_row.hpp"
#include "cpu/workspace.hpp"

namespace keyfold::cpu {

/// Two schedules, the same bits. Many rows to a group: splits are packed once, in parallel, those
/// of several groups where they are short, and shared by tasks of rows. Few rows (decode): tasks of
/// splits, whose keys and values are read where they lie (for tiles: packed panel by panel); their
/// partial states are then merged in ascending order.
class CpuRun : public core::Run {
 public:
  CpuRun(const core::Problem& problem, const core::Block& block, const Kernels& kernels,
         int num_threads);

  void submit(const core::Chunk& chunk, const core::KeySource& source) override;
  double wait() override;
  void merge(core::Run& other) override;
  void save(const StateView& to) override;
  void load(const StateView& from) override;
  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override;

 private:
  /// A split of a group: its keys as far as they exist and may be read.
  struct Split {
    std::int64_t group;
    core::KeyRange keys;
  };
  using Row = core::RowIndex;

  /// Runs `work`, whose for_each() then goes on as many threads as it is worth, at most those of
  /// the call, or on this one alone.
  template <class Work>
  void on_threads(double worth, const Work& work);
  template <class Body>
  void for_each(std::int64_t begin, std::int64_t end, const Body& body) const;
  ThreadSpace this_thread() const;

  /// A row of a group, by its number among the block's rows x query heads of the group.
  Row row_at(std::int64_t group, std::int64_t index) const;
  RowState state_at(std::int64_t group, std::int64_t index) const;
  Split split_at(std::int64_t group, std::int64_t key, std::int64_t key_end) const;

  /// Calls it for each row of the block and its state, on all threads.
  void for_each_state(const std::function<void(const Row&, const RowState&)>& body);

  void fold_by_rows(const ChunkBox& box, const core::KeySource& source);
  void fold_by_splits(const ChunkBox& box, const core::KeySource& source);
  /// The rows of k or v from the split's key `first` on, and how many there are, at most `most`.
  std::int64_t key_rows(const Split& split, std::int64_t first, std::int64_t most,
                        const TensorView& from, const core::KeySource& source,
                        RowSource* rows) const;
  void pack_k(const Split& split, std::int64_t first, const core::KeySource& source,
              float* panel) const;
  void pack_v(const Split& split, std::int64_t first, const core::KeySource& source,
              float* values) const;
  void pack_queries(std::int64_t group, std::int64_t begin, std::int64_t end, float* packed) const;
  /// The mask of a row for `keys` of the split that begins at `origin`: returns the panels of which
  /// it sees any, and says which of them have biases, stored from bias[0] for the split's first
  /// key.
  Panels gather_biases(const Row& row, core::KeyRange keys, std::int64_t origin, float* bias,
                       Panels* biased) const;
  /// Whether any of rows [begin, end) sees a key of the split's panel that starts at `first`; bias
  /// is room for a split's.
  bool any_sees(const Split& split, std::int64_t first, std::int64_t begin, std::int64_t end,
                float* bias) const;
  /// The tile of rows [begin, end) of the split's group, at most row_tile, queries packed at q;
  /// scores and bias are those from row `at` on. Its panels are 0 if none sees a key.
  Tile make_tile(const Split& split, std::int64_t begin, std::int64_t end, const float* q,
                 const ThreadSpace& space, std::int64_t at) const;
  /// Reduces a tile against a packed split.
  void reduce_packed(const Tile& tile, const PackedSplit& packed, const RowState& result) const;
  /// Reduces rows [begin, end) of a split's group into the partial states from `partial` on.
  void reduce_rows(const Split& split, const core::KeySource& source, std::int64_t begin,
                   std::int64_t end, const ThreadSpace& space, std::int64_t partial) const;

  const core::Problem& problem_;
  core::Block block_;
  const Kernels& kernels_;
  int most_threads_;
  int threads_ = 1;     // most that any work of this run was worth
  bool alone_ = false;  // of on_threads()
  Workspace workspace_;
  std::deque<double> seconds_;  // of submissions not waited for yet
};

}  // namespace keyfold::cpu

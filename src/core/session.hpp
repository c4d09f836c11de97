// A session: one problem on one backend, driven chunk by chunk under the pacer.
#pragma once

#include <chrono>
#include <memory>
#include <optional>

#include "core/backend.hpp"
#include "core/pace.hpp"
#include "core/plan.hpp"
#include "core/settings.hpp"
#include "keyfold/attention.hpp"

namespace keyfold::core {

class Session {
 public:
  /// Resolves the settings and selects the backend, which is `home` (a name, or empty) unless they
  /// name another; throws what they throw.
  Session(Problem problem, const RunOptions& options, const std::string& home = {});
  /// Throws InvalidArgument when the source is on another device than this session's.
  void check_reaches(const KeySource& source) const;

  const Problem& problem() const { return problem_; }
  const KernelInfo& kernel() const { return kernel_; }
  const Settings& settings() const { return settings_; }
  const Backend& backend() const { return *backend_; }

  /// How this many keys of a block are cut.
  CutRule cut_rule(const Block& block, std::int64_t num_keys, bool keys_on_device = false) const;
  /// The row blocks of a call.
  std::vector<Block> blocks() const { return blocks(settings_.max_scratch_bytes); }
  std::vector<Block> blocks(std::int64_t max_scratch_bytes) const {
    return blocks(max_scratch_bytes, 0, problem_.shape.q_len);
  }
  std::vector<Block> blocks(std::int64_t max_scratch_bytes, std::int64_t row_begin,
                            std::int64_t row_end) const;
  /// Scratch bytes of the largest of `blocks`.
  std::int64_t scratch_bytes(const std::vector<Block>& blocks) const;
  /// Makes what begin() would need beside memory.
  void warm() { backend_->warm(problem_); }
  /// A run in the empty state. Throws RunError(kOutOfMemory) when its scratch cannot be had.
  std::unique_ptr<Run> begin(const Block& block);
  /// Forgets what was done, for other blocks.
  void start_over();

  // A device that is lost in one of the following is replaced: the run goes back to its last
  // checkpoint, the budget is halved, and the chunks since then are run again, with the same bits.
  // After kMostLosses losses without a checkpoint between them the call fails.

  /// Folds `keys` of the source into the run. The source must live until finish(), except that
  /// after keep() it is not read again. Throws Cancelled at a chunk boundary, and whatever the
  /// progress callback or the backend throws.
  void fold(Run& run, const Block& block, const KeySource& source, KeyRange keys);
  /// Makes the run independent of the sources folded so far.
  void keep(Run& run);
  /// Adds the state of a run of another session over other keys; both must have been kept.
  void merge(Run& run, Run& other);
  /// Copies the run's state to tensors of the whole call, or from them.
  void save(Run& run, const StateView& to);
  void load(Run& run, const StateView& from);
  /// Writes the block's rows.
  void finish(Run& run, const MutableTensorView& out, const std::optional<MutableTensorView>& lse);

  static constexpr int kMostLosses = 4;

  /// What was done so far.
  Report report() const;

 private:
  /// Where a run stands: what is left of a fold, and how far that is.
  struct Position {
    std::optional<ChunkCutter> cutter;
    double done_flops = 0;
    std::int64_t next_key = 0;
  };

  void check_stop() const;
  void finished(const Chunk& chunk, double seconds);
  /// Runs what is left of the fold.
  void drive(Run& run);
  /// Whether what follows the block's last dispatch follows it in the order of the caller's stream.
  bool returns_early() const;
  bool checkpoint_due() const;
  void checkpoint(Run& run);
  void kept();
  /// step(), again after each loss, from where the last checkpoint is.
  template <class Step>
  void survive(Run& run, Run* other, const Step& step);
  void lost(const DeviceLost& error);

  Problem problem_;
  RunOptions options_;
  Settings settings_;
  std::shared_ptr<Backend> backend_;
  KernelInfo kernel_;
  Pacer pacer_;
  Progress progress_;
  double total_flops_ = 0;
  Block block_;
  KeySource source_;
  Position at_;    // where the run is
  Position kept_;  // where its last checkpoint is, or where it began
  std::chrono::steady_clock::time_point kept_time_;
  double checkpoint_ms_ = 0;  // what the last checkpoint took
  bool worked_ = false;       // whether a dispatch has finished since
  int losses_ = 0;            // since then
  std::int64_t recoveries_ = 0;
  std::int64_t scratch_bytes_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace keyfold::core

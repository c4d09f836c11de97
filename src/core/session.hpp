// A session: one problem on one backend, driven chunk by chunk under the pacer.
#pragma once

#include <chrono>
#include <memory>

#include "core/backend.hpp"
#include "core/pace.hpp"
#include "core/plan.hpp"
#include "core/settings.hpp"
#include "keyfold/attention.hpp"

namespace keyfold::core {

class Session {
 public:
  /// Resolves the settings and selects the backend; throws what they throw.
  Session(Problem problem, const RunOptions& options);

  const Problem& problem() const { return problem_; }
  const KernelInfo& kernel() const { return kernel_; }
  const Settings& settings() const { return settings_; }
  Backend& backend() { return *backend_; }

  /// How a range of this many keys is cut.
  CutRule cut_rule(std::int64_t num_keys) const;
  /// The row blocks of a call.
  std::vector<Block> blocks() const;
  /// Scratch bytes of the largest of `blocks`.
  std::int64_t scratch_bytes(const std::vector<Block>& blocks) const;
  std::unique_ptr<Run> begin(const Block& block);

  /// Folds `keys` of the source into the run. Throws Cancelled at a chunk boundary, and whatever
  /// the progress callback or the backend throws.
  void fold(Run& run, const Block& block, const KeySource& source, KeyRange keys);

  /// What was done so far.
  Report report() const;

 private:
  void check_stop() const;
  void finished(const Chunk& chunk, double seconds, const Block& block);

  Problem problem_;
  RunOptions options_;
  Settings settings_;
  std::shared_ptr<Backend> backend_;
  KernelInfo kernel_;
  Pacer pacer_;
  Progress progress_;
  double total_flops_ = 0;
  double done_flops_ = 0;
  std::int64_t scratch_bytes_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace keyfold::core

// A backend without a device: its times and failures are scripted, its arithmetic only checks that
// every row is given each visible key once and in ascending order. out = number of keys seen.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "core/backend.hpp"

namespace keyfold::test {

/// Counts what chunks bring to the rows of a block; fails the running test on any disorder. A copy
/// is a checkpoint.
class FoldCheck {
 public:
  FoldCheck(const core::Problem& problem, const core::Block& block, core::KeyRange keys,
            std::int64_t split_len);
  void fold(const ChunkBox& box);
  /// Whether each row has seen all of its keys.
  bool complete() const;
  std::int64_t seen(std::int64_t group, std::int64_t row) const { return state(group, row).seen; }

 private:
  struct State {
    std::int64_t next = 0, seen = 0;
  };
  const State& state(std::int64_t group, std::int64_t row) const;
  core::KeyRange visible(std::int64_t group, std::int64_t row) const;

  const core::Problem* problem_;
  core::Block block_;
  core::KeyRange keys_;
  std::int64_t split_len_;
  std::vector<State> states_;
};

struct Script {
  core::KernelInfo kernel{.name = "none",
                          .split_len = 64,
                          .row_align = 16,
                          .max_in_flight = 2,
                          .first_dispatch_flops = 1e6,
                          .flops_per_second = 1e9};
  /// Device time of dispatch `index`.
  std::function<double(std::int64_t index, double flops)> seconds = [](std::int64_t, double flops) {
    return flops / 1e9;
  };
  /// Called when dispatch `index` is submitted or waited for; may throw.
  std::function<void(std::int64_t index)> on_submit = [](std::int64_t) {};
  std::function<void(std::int64_t index)> on_wait = [](std::int64_t) {};
  /// What each chunk's keys come from.
  std::function<void(const ChunkBox&, const core::KeySource&)> on_source =
      [](const ChunkBox&, const core::KeySource&) {};
  std::function<void()> on_finish = [] {};
  std::function<void(const core::Block&)> on_begin = [](const core::Block&) {};
  std::function<void(std::int64_t bytes)> on_allocate = [](std::int64_t) {};
  std::function<void()> on_merge = [] {};
  std::function<void()> on_checkpoint = [] {};
  std::function<void()> on_recover = [] {};
  std::int64_t bytes_per_row = 64;
  std::int64_t max_chunk_keys = core::kUnknownLength;
};

/// What the core did.
struct Log {
  std::vector<core::Chunk> chunks;
  std::vector<double> seconds;
  std::int64_t waited = 0;
  int in_flight = 0, most_in_flight = 0;
  int runs_alive = 0, runs_begun = 0, most_runs_alive = 0;
  int checkpoints = 0, recoveries = 0;
};

class ScriptedBackend : public core::Backend {
 public:
  static constexpr const char* kName = "scripted";
  /// The registered instance, with a fresh script and log.
  static ScriptedBackend& fresh();

  DeviceInfo device() const override;
  std::string unsupported(const core::Problem& problem) const override;
  core::KernelInfo kernel(const core::Problem&) const override { return script.kernel; }
  std::int64_t scratch_bytes(const core::Problem& problem, std::int64_t groups, std::int64_t rows,
                             int num_threads) const override;
  std::int64_t max_chunk_keys(const core::Problem&, const core::Block&,
                              bool keys_on_device) const override {
    return keys_on_device ? core::kUnknownLength : script.max_chunk_keys;
  }
  std::shared_ptr<core::DeviceMemory> allocate(std::int64_t bytes) override;
  std::unique_ptr<core::Run> begin(const core::Problem& problem, const core::Block& block,
                                   int num_threads) override;

  Script script;
  Log log;
};

}  // namespace keyfold::test

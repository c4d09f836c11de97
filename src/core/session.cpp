// The one loop that runs chunks: submit, wait, learn the time, report, stop.
#include "core/session.hpp"

#include <algorithm>
#include <deque>
#include <sstream>
#include <string>

#include "core/device_memory.hpp"
#include "core/guard.hpp"
#include "core/registry.hpp"

namespace keyfold::core {
namespace {

constexpr double kCheckpointShare = 100;   // times its cost: checkpoints take under 1 %
constexpr double kCheapCheckpointMs = 10;  // under 1 % of the second between them

double elapsed_ms(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

/// The settings, with the backend `home` where they name none.
Settings settings_at(const RunOptions& options, const std::string& home) {
  Settings settings = resolve_settings(options);
  if (!settings.backend && !home.empty()) settings.backend = home;
  return settings;
}

}  // namespace

Session::Session(Problem problem, const RunOptions& options, const std::string& home)
    : problem_(std::move(problem)),
      options_(options),
      settings_(settings_at(options, home)),
      backend_(select_backend(settings_, problem_)),
      kernel_(backend_->kernel(problem_)),
      pacer_(settings_.budget_seconds, kernel_.first_dispatch_flops,
             kernel_.least_flops_per_second) {
  const AttentionShape& s = problem_.shape;
  if (s.kv_len != kUnknownLength) {
    total_flops_ = problem_.flops_per_pair() *
                   problem_.visible_pairs({0, problem_.num_groups(), 0, s.q_len, 0, s.kv_len});
  }
}

void Session::check_reaches(const KeySource& source) const {
  const std::string here = backend_->device().backend, there = backend_of(source);
  if (there.empty() || there == here) return;
  throw InvalidArgument("k", "expected host memory, or a device buffer on backend '" + here +
                                 "', where this runs, got one on backend '" + there +
                                 "'; name that backend, or none");
}

CutRule Session::cut_rule(const Block& block, std::int64_t num_keys, bool keys_on_device) const {
  const std::int64_t split = kernel_.split_len;
  return {.split_len = split,
          .row_align = kernel_.row_align,
          .chunk_keys = (settings_.chunk_size + split - 1) / split * split,
          .whole = num_keys < settings_.chunk_threshold,
          .max_keys = backend_->max_chunk_keys(problem_, block, keys_on_device)};
}

std::vector<Block> Session::blocks(std::int64_t max_scratch_bytes, std::int64_t row_begin,
                                   std::int64_t row_end) const {
  return plan_blocks(problem_, *backend_, max_scratch_bytes, settings_.num_threads, row_begin,
                     row_end);
}

std::int64_t Session::scratch_bytes(const std::vector<Block>& blocks) const {
  std::int64_t most = 0;
  for (const Block& b : blocks) {
    most = std::max(most, backend_->scratch_bytes(problem_, b.group_end - b.group_begin,
                                                  b.row_end - b.row_begin, settings_.num_threads));
  }
  return most;
}

std::unique_ptr<Run> Session::begin(const Block& block) {
  progress_.next_row = block.row_begin;
  progress_.next_key = 0;
  block_ = block;
  at_.cutter.reset();
  at_.next_key = 0;
  for (;;) {
    try {
      auto run =
          guard_memory([&] { return backend_->begin(problem_, block, settings_.num_threads); });
      scratch_bytes_ = std::max(scratch_bytes_, scratch_bytes({block}));
      kept();
      return run;
    } catch (const DeviceLost& error) {
      lost(error);
    }
  }
}

void Session::start_over() {
  scratch_bytes_ = 0;
  at_ = {};
}

void Session::check_stop() const {
  if (!options_.stop_token.stop_requested()) return;
  throw Cancelled("cancelled after " + std::to_string(progress_.dispatches) +
                      " dispatches, at row " + std::to_string(progress_.next_row) + ", key " +
                      std::to_string(progress_.next_key) + "; nothing was written",
                  progress_);
}

void Session::finished(const Chunk& chunk, double seconds) {
  pacer_.record(chunk.flops, seconds);
  worked_ = true;
  at_.done_flops += chunk.flops;
  // Keys count as folded once the last rows of the block have seen them.
  const bool sweep_done =
      chunk.box.group_end == block_.group_end && chunk.box.row_end == block_.row_end;
  if (sweep_done) at_.next_key = chunk.box.key_end;
  progress_.dispatches += 1;
  progress_.fraction = total_flops_ > 0 ? std::min(1.0, at_.done_flops / total_flops_) : 0;
  progress_.elapsed_ms = elapsed_ms(start_);
  progress_.last_dispatch_ms = seconds * 1e3;
  progress_.longest_dispatch_ms = std::max(progress_.longest_dispatch_ms, seconds * 1e3);
  progress_.next_key = at_.next_key;
  if (options_.progress) options_.progress(progress_);
}

void Session::drive(Run& run) {
  if (!at_.cutter) return;
  // The cutter runs ahead of what is finished by what is in flight.
  std::deque<Chunk> in_flight;
  const auto wait_oldest = [&] {
    const double seconds = run.wait();
    const Chunk chunk = in_flight.front();
    in_flight.pop_front();
    finished(chunk, seconds);
  };
  const auto drain = [&] {
    while (!in_flight.empty()) wait_oldest();
  };
  for (;;) {
    check_stop();
    if (checkpoint_due()) {
      drain();
      checkpoint(run);
    }
    const std::optional<Chunk> chunk = at_.cutter->next(pacer_.next_flops());
    if (!chunk) break;
    run.submit(*chunk, source_);
    in_flight.push_back(*chunk);
    if (static_cast<int>(in_flight.size()) == kernel_.max_in_flight) wait_oldest();
  }
  if (returns_early()) {
    progress_.dispatches += static_cast<std::int64_t>(in_flight.size());
  } else {
    drain();
  }
  check_stop();
}

bool Session::returns_early() const {
  return problem_.device != Device{} && block_.group_end == problem_.num_groups() &&
         block_.row_end == problem_.shape.q_len;
}

bool Session::checkpoint_due() const {
  // A device that was lost may be lost again soon: as the budget shrinks, so does the time at risk.
  return kernel_.checkpoint_seconds > 0 && worked_ &&
         elapsed_ms(kept_time_) >=
             pacer_.budget_share() *
                 std::max(1e3 * kernel_.checkpoint_seconds, checkpoint_ms_ > kCheapCheckpointMs
                                                                ? kCheckpointShare * checkpoint_ms_
                                                                : 0);
}

void Session::checkpoint(Run& run) {
  const auto start = std::chrono::steady_clock::now();
  run.checkpoint();
  checkpoint_ms_ = elapsed_ms(start);
  kept();
}

void Session::kept() {
  kept_ = at_;
  kept_time_ = std::chrono::steady_clock::now();
  worked_ = false;
  losses_ = 0;
}

template <class Step>
void Session::survive(Run& run, Run* other, const Step& step) {
  bool recover = false;
  for (;;) {
    try {
      if (recover) {
        run.recover();
        if (other) other->recover();
        at_ = kept_;
        if (at_.cutter) at_.cutter->obey_work();
        recover = false;
      }
      step();
      return;
    } catch (const DeviceLost& error) {
      lost(error);
      recover = true;
    }
  }
}

void Session::lost(const DeviceLost& error) {
  if (kernel_.checkpoint_seconds == 0) throw;
  if (source_.on_device()) {
    throw RunError(ErrorCode::kDeviceFailure,
                   std::string(error.what()) +
                       ": the keys and values in its device buffers are gone with it; make these "
                       "buffers anew, and lower budget_ms if it happens again");
  }
  recoveries_ += 1;
  losses_ += 1;
  if (losses_ >= kMostLosses) {
    std::ostringstream budget;
    budget << settings_.budget_seconds * 1e3 * pacer_.budget_share();
    throw RunError(
        ErrorCode::kDeviceFailure,
        std::string(error.what()) + ": lost " + std::to_string(losses_) +
            " times without progress, at row " + std::to_string(progress_.next_row) + ", key " +
            std::to_string(at_.next_key) + ", at last with a budget of " + budget.str() +
            " ms; nothing was written. Lower budget_ms, free the device of other work and memory, "
            "or name another backend");
  }
  pacer_.halve_budget();
}

void Session::fold(Run& run, const Block& block, const KeySource& source, KeyRange keys) {
  source_ = source;
  at_.cutter.emplace(problem_, block, keys, cut_rule(block, keys.size(), source.on_device()));
  if (recoveries_ > 0) at_.cutter->obey_work();
  kept();  // the run is empty, or was kept before
  survive(run, nullptr, [&] { drive(run); });
}

void Session::keep(Run& run) {
  if (kernel_.checkpoint_seconds > 0) {
    survive(run, nullptr, [&] {
      drive(run);
      checkpoint(run);
    });
  }
  at_.cutter.reset();
  source_ = {};
  kept();
}

void Session::merge(Run& run, Run& other) {
  survive(run, &other, [&] {
    run.merge(other);
    checkpoint(run);
  });
}

void Session::save(Run& run, const StateView& to) {
  survive(run, nullptr, [&] {
    drive(run);
    run.save(to);
  });
}

void Session::load(Run& run, const StateView& from) {
  survive(run, nullptr, [&] {
    run.load(from);
    checkpoint(run);
  });
}

void Session::finish(Run& run, const MutableTensorView& out,
                     const std::optional<MutableTensorView>& lse) {
  survive(run, nullptr, [&] {
    drive(run);
    run.finish(out, lse);
  });
}

Report Session::report() const {
  return {.backend = backend_->device().backend,
          .kernel = kernel_.name,
          .dispatches = progress_.dispatches,
          .longest_dispatch_ms = progress_.longest_dispatch_ms,
          .elapsed_ms = elapsed_ms(start_),
          .scratch_bytes = scratch_bytes_,
          .staging_bytes = 0,
          .recoveries = recoveries_};
}

}  // namespace keyfold::core

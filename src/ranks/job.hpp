// One rank's part of one call: states of slices over its own keys, and results from merged states.
#pragma once

#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "core/session.hpp"
#include "core/staging.hpp"
#include "keyfold/context_parallel.hpp"
#include "ranks/agreement.hpp"
#include "ranks/blocks.hpp"
#include "ranks/channel.hpp"
#include "ranks/shards.hpp"

namespace keyfold::ranks {

/// The state of a slice in memory: m, l and o, each dense.
struct SliceState {
  float *m, *l, *o;
};

/// A failure of this rank is kept rather than thrown, as the others must learn of it first: from
/// then on compute() and finish() do nothing.
class Job {
 public:
  /// `problem` is that of all keys and all rows; `q`, `out` and `lse` are this rank's rows.
  Job(Channel& channel, core::Problem problem, const TensorView& q, const TensorView& k,
      const TensorView& v, const MutableTensorView& out, const ContextParallelOptions& options,
      std::vector<Segment> segments, std::vector<Owned> owned);
  Job(const Job&) = delete;  // its options refer to it
  Job& operator=(const Job&) = delete;

  Channel& channel() const { return channel_; }
  const core::Problem& problem() const { return problem_; }
  const std::vector<Owned>& owned() const { return owned_; }
  const std::vector<Segment>& segments() const { return segments_; }
  /// Whether each rank has rows of its own.
  bool own_rows() const { return owned_.front().owner != Slice::kAll; }
  /// Backend and kernel, whose bits a state has; empty after a failure.
  std::string kernel() const;
  /// Of the kernel; 1 after a failure.
  std::int64_t split_len() const { return split_len_; }

  /// Does `work`, unless this rank has failed, and keeps what it throws.
  template <class Work>
  void attempt(const Work& work) {
    if (failure_) return;
    try {
      work();
    } catch (...) {
      failure_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }
  /// The mark of this rank in a maximum over all ranks: 0, or what says that it failed.
  float mark() const { return failure_ ? 1.0f : 0.0f; }
  [[noreturn]] void throw_failure() const { ranks::throw_failure(channel_, failure_); }

  /// Keys [begin, end) of a segment of this rank, which they are part of.
  TensorView keys_of(const Segment& segment, KeySpan keys) const;
  TensorView values_of(const Segment& segment, KeySpan keys) const;

  /// The queries of a slice that this rank owns, dense.
  void copy_queries(const Slice& slice, void* to) const;
  /// Folds this rank's keys of `segments` into a state: the empty one, or with `go_on` what `state`
  /// holds. `q`: the slice's queries, dense; null where this rank has all rows.
  void compute(const Slice& slice, const void* q, std::span<const Segment> segments,
               const SliceState& state, bool go_on = false);
  /// Results from merged states: those of compute(), or the sums with the maximum.
  void finish(const Slice& slice, const SliceState& state);

  // The rows that this rank has for itself, some at a time, each with all keys in their order:

  /// How many times this takes, each within max_scratch_bytes; 0 after a failure.
  std::int64_t own_passes();
  void begin_pass(std::int64_t number);
  /// Keys and values that stay as they are until the next call.
  void fold_own(const TensorView& k, const TensorView& v, KeySpan keys);
  void finish_pass();

  /// Hands out the results.
  void commit();
  /// The numbers of a slice's state behind each other: m, l, o.
  std::int64_t state_floats(const Slice& slice) const {
    return slice.states(problem_) * (problem_.shape.value_dim + 2);
  }
  Report report() const { return report_; }

  SliceState state_at(const Slice& slice, float* numbers) const {
    const std::int64_t states = slice.states(problem_);
    return {numbers, numbers + states, numbers + 2 * states};
  }

 private:
  /// Rows of this rank in one session of their own.
  struct Rows {
    core::Block block;
    std::int64_t shift = 0;  // as a Slice's
    std::unique_ptr<core::Session> session;
    std::unique_ptr<core::Run> run;  // refers to the session
  };

  /// With the queries of a slice where `q` is, or where this rank has all.
  std::unique_ptr<core::Session> session_for(const Slice& slice, const void* q);
  std::unique_ptr<core::Session> session_with(const TensorView& q);
  /// After work in that session.
  void account(const core::Session& session);
  void write_rows(core::Session& session, core::Run& run, std::int64_t shift);
  StateView view_of(const Slice& slice, const SliceState& state) const;
  void progressed(Progress progress, double& fraction);

  Channel& channel_;
  core::Problem problem_;
  TensorView q_, k_, v_;
  MutableTensorView out_;
  AttentionOptions attention_;
  std::vector<Segment> segments_;
  std::vector<Owned> owned_;
  std::int64_t split_len_ = 1;
  double share_ = 1;  // of all visible pairs, those that this rank computes
  double done_ = 0;   // of all visible pairs
  std::int64_t dispatches_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::optional<core::Staging> staging_;
  std::vector<std::vector<Rows>> passes_;
  std::int64_t pass_ = 0;  // the one that was begun
  std::exception_ptr failure_;
  Report report_;
};

}  // namespace keyfold::ranks

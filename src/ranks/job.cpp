// Sessions over slices; what the others are told is reduce.cpp's and chain.cpp's.
#include "ranks/job.hpp"

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/copy_tensor.hpp"
#include "core/device_memory.hpp"
#include "core/guard.hpp"

namespace keyfold::ranks {
namespace {

/// Rows [begin, begin + count) of the len axis.
TensorView rows_of(TensorView view, std::int64_t begin, std::int64_t count) {
  view.data =
      static_cast<const std::byte*>(view.data) + begin * view.strides[2] * size_of(view.dtype);
  view.sizes[2] = count;
  return view;
}

core::Block block_of(const Slice& slice, const core::Problem& problem) {
  const std::int64_t kv_heads = problem.shape.num_kv_heads;
  return {slice.batch_begin * kv_heads + slice.kv_head_begin,
          (slice.batch_end - 1) * kv_heads + slice.kv_head_end, slice.row_begin, slice.row_end};
}

MutableTensorView writable(const TensorView& view) {
  return {const_cast<void*>(view.data), view.dtype, view.sizes, view.strides};
}

}  // namespace

Job::Job(Channel& channel, core::Problem problem, const TensorView& q, const TensorView& k,
         const TensorView& v, const MutableTensorView& out, const ContextParallelOptions& options,
         std::vector<Segment> segments, std::vector<Owned> owned)
    : channel_(channel),
      problem_(std::move(problem)),
      q_(q),
      k_(k),
      v_(v),
      out_(out),
      attention_(options.attention),
      segments_(std::move(segments)),
      owned_(std::move(owned)) {
  const AttentionShape& s = problem_.shape;
  const bool keys_pass = own_rows() && options.order == MergeOrder::kOrdered;
  attempt([&] {
    core::guard_memory([&] {
      problem_ = core::make_problem(s, &q, attention_);
      const core::Session session(problem_, attention_.run);
      split_len_ = session.kernel().split_len;
      // Keys that pass by are folded by this kernel, whosever they are.
      check_begins(segments_, keys_pass ? kAllRanks : channel.rank(), split_len_,
                   options.stripe_len);
      AttentionShape mine = s;
      mine.q_len = q.sizes[2];
      staging_.emplace(mine, attention_.lse.has_value());
      report_ = session.report();
    });
  });
  const auto pairs = [&](std::int64_t row_begin, std::int64_t row_end, KeySpan keys) {
    return problem_.visible_pairs(
        {0, problem_.num_groups(), row_begin, row_end, keys.begin, keys.end});
  };
  double own = 0;
  if (keys_pass) {
    for (const Owned& it : owned_) {
      if (it.owner == channel.rank()) own += pairs(it.row_begin, it.row_end, {0, s.kv_len});
    }
  } else {
    for (const Segment& it : segments_) {
      if (it.rank == channel.rank()) own += pairs(0, s.q_len, it.keys);
    }
  }
  if (own > 0) share_ = own / pairs(0, s.q_len, {0, s.kv_len});
}

std::string Job::kernel() const { return report_.backend + " " + report_.kernel; }

void Job::progressed(Progress progress, double& fraction) {
  channel_.poke();
  done_ += progress.fraction - fraction;
  fraction = progress.fraction;
  if (!attention_.run.progress) return;
  progress.fraction = std::min(1.0, done_ / share_);
  progress.dispatches = ++dispatches_;
  progress.elapsed_ms =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  progress.longest_dispatch_ms =
      std::max(progress.longest_dispatch_ms, report_.longest_dispatch_ms);
  attention_.run.progress(progress);
}

std::unique_ptr<core::Session> Job::session_for(const Slice& slice, const void* q) {
  if (q == nullptr) return session_with(problem_.q);
  return session_with(slice_view(problem_, slice, const_cast<void*>(q), q_.dtype, q_.sizes[3]));
}

std::unique_ptr<core::Session> Job::session_with(const TensorView& q) {
  core::Problem problem = problem_;
  problem.q = q;
  RunOptions run = attention_.run;
  run.progress = [this, fraction = 0.0](const Progress& progress) mutable {
    progressed(progress, fraction);
  };
  return std::make_unique<core::Session>(std::move(problem), run);
}

void Job::account(const core::Session& session) {
  const Report now = session.report();
  report_.dispatches += now.dispatches;
  report_.longest_dispatch_ms = std::max(report_.longest_dispatch_ms, now.longest_dispatch_ms);
  report_.elapsed_ms += now.elapsed_ms;
  report_.scratch_bytes = std::max(report_.scratch_bytes, now.scratch_bytes);
  report_.recoveries += now.recoveries;
}

StateView Job::view_of(const Slice& slice, const SliceState& state) const {
  const auto view = [&](float* data, std::int64_t dim) {
    return slice_view(problem_, slice, data, DType::kFloat32, dim);
  };
  return {view(state.m, 1), view(state.l, 1), view(state.o, problem_.shape.value_dim)};
}

void Job::copy_queries(const Slice& slice, void* to) const {
  const Dims sizes{slice.batch_end - slice.batch_begin,
                   (slice.kv_head_end - slice.kv_head_begin) * problem_.group_size(), slice.rows(),
                   q_.sizes[3]};
  const std::byte* const first =
      core::element(q_, slice.batch_begin, slice.kv_head_begin * problem_.group_size(),
                    slice.row_begin - slice.shift, 0);
  core::copy_tensor({first, q_.dtype, sizes, q_.strides}, {to, q_.dtype, sizes});
}

void Job::compute(const Slice& slice, const void* q, std::span<const Segment> segments,
                  const SliceState& state, bool go_on) {
  const auto mine = [&](const Segment& segment) { return segment.rank == channel_.rank(); };
  if (!go_on && std::none_of(segments.begin(), segments.end(), mine)) {
    const std::int64_t states = slice.states(problem_);
    std::fill_n(state.m, states, -std::numeric_limits<float>::infinity());
    std::fill_n(state.l, states, 0.0f);
    std::fill_n(state.o, states * problem_.shape.value_dim, 0.0f);
    return;
  }
  attempt([&] {
    core::guard_memory([&] {
      const std::unique_ptr<core::Session> session = session_for(slice, q);
      const core::Block block = block_of(slice, problem_);
      const std::unique_ptr<core::Run> run = session->begin(block);
      if (go_on) session->load(*run, view_of(slice, state));
      bool folded = false;
      for (const Segment& segment : segments) {
        if (!mine(segment)) continue;
        if (folded) session->keep(*run);
        const core::KeySource source = core::locate_keys(
            keys_of(segment, segment.keys), values_of(segment, segment.keys), segment.keys.begin);
        session->check_reaches(source);
        session->fold(*run, block, source, {segment.keys.begin, segment.keys.end});
        folded = true;
      }
      session->save(*run, view_of(slice, state));
      account(*session);
    });
  });
}

void Job::finish(const Slice& slice, const SliceState& state) {
  if (slice.owner != Slice::kAll && slice.owner != channel_.rank()) return;
  attempt([&] {
    core::guard_memory([&] {
      const std::unique_ptr<core::Session> session = session_for(slice, nullptr);
      const std::unique_ptr<core::Run> run = session->begin(block_of(slice, problem_));
      session->load(*run, view_of(slice, state));
      write_rows(*session, *run, slice.shift);
    });
  });
}

void Job::write_rows(core::Session& session, core::Run& run, std::int64_t shift) {
  std::optional<MutableTensorView> lse;
  if (staging_->lse()) lse = writable(shifted(*staging_->lse(), 0, 0, shift));
  session.finish(run, writable(shifted(staging_->out(), 0, 0, shift)), lse);
  account(session);
}

TensorView Job::keys_of(const Segment& segment, KeySpan keys) const {
  return rows_of(k_, segment.first_row + keys.begin - segment.keys.begin, keys.end - keys.begin);
}
TensorView Job::values_of(const Segment& segment, KeySpan keys) const {
  return rows_of(v_, segment.first_row + keys.begin - segment.keys.begin, keys.end - keys.begin);
}

std::int64_t Job::own_passes() {
  attempt([&] {
    const std::unique_ptr<core::Session> session = session_with(problem_.q);
    const std::int64_t most = session->settings().max_scratch_bytes;
    std::int64_t taken = most;  // of the pass that is being filled; full, as there is none
    for (const Owned& it : owned_) {
      if (it.owner != channel_.rank() || it.row_begin == it.row_end) continue;
      for (const core::Block& block : session->blocks(most, it.row_begin, it.row_end)) {
        const std::int64_t bytes = session->scratch_bytes({block});
        if (taken + bytes > most) {
          passes_.emplace_back();
          taken = 0;
        }
        taken += bytes;
        passes_.back().push_back({block, it.shift, nullptr, nullptr});
      }
    }
  });
  return static_cast<std::int64_t>(passes_.size());
}

void Job::begin_pass(std::int64_t number) {
  pass_ = number;
  attempt([&] {
    for (Rows& rows : passes_[static_cast<std::size_t>(number)]) {
      rows.session = session_with(shifted(q_, 0, 0, rows.shift));
      rows.run = rows.session->begin(rows.block);
    }
  });
}

void Job::fold_own(const TensorView& k, const TensorView& v, KeySpan keys) {
  attempt([&] {
    const core::KeySource source = core::locate_keys(k, v, keys.begin);
    for (Rows& rows : passes_[static_cast<std::size_t>(pass_)]) {
      rows.session->fold(*rows.run, rows.block, source, {keys.begin, keys.end});
      rows.session->keep(*rows.run);
    }
  });
}

void Job::finish_pass() {
  attempt([&] {
    for (Rows& rows : passes_[static_cast<std::size_t>(pass_)]) {
      write_rows(*rows.session, *rows.run, rows.shift);
      rows.run.reset();
      rows.session.reset();
    }
  });
}

void Job::commit() {
  staging_->commit(out_, attention_.lse);
  report_.staging_bytes = core::Staging::bytes(problem_.shape, attention_.lse.has_value());
}

}  // namespace keyfold::ranks

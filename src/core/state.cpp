// AttentionState: whole splits are folded as they complete, the ragged end waits in a tail.
#include "keyfold/state.hpp"

#include <vector>

#include "core/device_memory.hpp"
#include "core/guard.hpp"
#include "core/session.hpp"
#include "core/tail.hpp"
#include "core/validate.hpp"

namespace keyfold {
namespace core {
namespace {

bool same_formula(const Problem& a, const Problem& b) {
  const AttentionShape &s = a.shape, &t = b.shape;
  const TensorView no_mask;
  const TensorView &m = a.mask ? *a.mask : no_mask, &n = b.mask ? *b.mask : no_mask;
  return s.batch == t.batch && s.num_heads == t.num_heads && s.num_kv_heads == t.num_kv_heads &&
         s.q_len == t.q_len && s.head_dim == t.head_dim && s.value_dim == t.value_dim &&
         s.dtype == t.dtype && a.scale == b.scale && a.softcap == b.softcap &&
         a.window_left == b.window_left && a.window_right == b.window_right &&
         a.q_offset == b.q_offset && a.key_limit == b.key_limit && a.sinks == b.sinks &&
         m.data == n.data && m.dtype == n.dtype && m.strides == n.strides;
}

}  // namespace
}  // namespace core

class AttentionState::Impl {
 public:
  Impl(const TensorView& q, const AttentionOptions& options, std::int64_t first_key)
      : q_(q),
        options_(options),
        shape_(core::check_query(q)),
        first_key_(first_key),
        tail_begin_(first_key) {
    core::check_device("q", q, {});  // the tail is kept on the host
    core::check_on_host("kv_lens", options.kv_lens.data());
    kv_lens_.assign(options.kv_lens.begin(), options.kv_lens.end());
    options_.kv_lens = kv_lens_;
    options_.lse.reset();
    shape_.kv_len = core::kUnknownLength;
    // A session for a likely shape finds wrong options now rather than at the first update.
    AttentionShape likely = shape_;
    likely.num_kv_heads = shape_.num_heads;
    likely.value_dim = shape_.head_dim;
    const core::Session session(core::make_problem(likely, &q_, options_), options_.run);
    split_len_ = session.kernel().split_len;
    check_position("first_key", first_key, 0, split_len_);
  }

  std::int64_t next_key() const { return tail_begin_ + (tail_ ? tail_->size() : 0); }

  void skip_to(std::int64_t key) {
    check_usable();
    check_position("key", key, next_key(), split_len_);
    usable_ = false;
    if (session_) fold_tail();
    tail_begin_ = key;
    usable_ = true;
  }

  void update(const TensorView& k, const TensorView& v) {
    check_usable();
    AttentionShape shape = shape_;
    if (!session_) {
      shape.num_kv_heads = k.sizes[1];
      shape.value_dim = v.sizes[3];
    }
    const std::int64_t count = core::check_keys(shape, k, v);
    check_mask_reaches(count);
    if (count > 0 && tail_begin_ % split_len_ != 0) {
      throw InvalidArgument("k", "expected no keys, as the state was saved inside a split, got " +
                                     std::to_string(count) + "; skip_to() the next split");
    }
    const core::KeySource source = core::locate_keys(k, v, next_key());
    if (!session_) begin(shape, core::backend_of(source), &source);
    session_->check_reaches(source);

    usable_ = false;  // until all of these keys are folded or kept
    std::int64_t used = 0;
    if (tail_->size() > 0) {
      used = std::min(count, tail_->room());
      append(source, {0, used});
      if (tail_->room() == 0) fold_tail();
    }
    const std::int64_t whole = (count - used) / split_len_ * split_len_;
    if (whole > 0) {
      fold(source, {tail_begin_, tail_begin_ + whole});
      tail_begin_ += whole;
      used += whole;
    }
    if (used < count) append(source, {used, count});
    usable_ = true;
  }

  void save(const StateView& to) {
    check_usable();
    AttentionShape shape = shape_;
    const bool unfed = !session_;  // no key ever came
    if (unfed) {
      shape.num_kv_heads = shape.num_heads;
      shape.value_dim = to.o.sizes[3];
    }
    core::check_state(shape, to, true);
    if (unfed) begin(shape, {});
    usable_ = false;
    fold_tail();
    session_->save(*run_, to);
    if (unfed) clear(tail_begin_);  // the first keys may have other heads
    usable_ = true;
  }

  void load(const StateView& from, std::int64_t num_kv_heads) {
    check_usable();
    AttentionShape shape = shape_;
    if (!session_) {
      shape.num_kv_heads = num_kv_heads;
      shape.value_dim = from.o.sizes[3];
    } else if (num_kv_heads != shape.num_kv_heads) {
      throw InvalidArgument("num_kv_heads", "expected " + std::to_string(shape.num_kv_heads) +
                                                ", as the keys had, got " +
                                                std::to_string(num_kv_heads));
    }
    core::check_state(shape, from, false);
    if (!session_) begin(shape, {});
    usable_ = false;
    tail_begin_ = next_key();
    tail_->clear();
    session_->load(*run_, from);
    usable_ = true;
  }

  void merge(Impl& other) {
    if (&other == this) {
      throw InvalidArgument("other", "expected another state, got this one");
    }
    check_usable();
    other.check_usable();
    if (!other.session_) return;
    const core::Problem& theirs = other.session_->problem();
    const auto check_same = [&](const core::Problem& ours) {
      if (core::same_formula(ours, theirs)) return;
      throw InvalidArgument("other", "expected a state of the same shapes and options");
    };
    if (session_) {
      check_same(session_->problem());
    } else {
      if (q_.sizes != other.q_.sizes || q_.dtype != other.q_.dtype) {
        throw InvalidArgument("other", "expected a state of the same q");
      }
      check_same(core::make_problem(theirs.shape, &q_, options_));
      begin(theirs.shape, other.session_->report().backend);
    }
    const auto kernel = [](const core::Session& session) {
      const Report report = session.report();
      return report.backend + " " + report.kernel;
    };
    if (kernel(*session_) != kernel(*other.session_)) {
      throw InvalidArgument("other", "expected a state of the same backend and kernel (" +
                                         kernel(*session_) + "), got " + kernel(*other.session_));
    }
    usable_ = other.usable_ = false;
    other.fold_tail();
    session_->merge(*run_, *other.run_);
    other.clear(other.first_key_);
    usable_ = other.usable_ = true;
  }

  Report finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
    check_usable();
    AttentionShape shape = shape_;
    if (!session_) {  // no key ever came
      shape.num_kv_heads = shape.num_heads;
      shape.value_dim = out.sizes[3];
    }
    core::check_output(shape, out, lse);
    if (!session_) begin(shape, {});
    usable_ = false;
    fold_tail();
    session_->finish(*run_, out, lse);
    Report report = session_->report();
    clear(first_key_);
    usable_ = true;
    return report;
  }

 private:
  void check_usable() const {
    if (!usable_) {
      throw InvalidArgument("state",
                            "expected a state whose calls succeeded, got one that was "
                            "cancelled or failed; it can only be destroyed");
    }
  }

  void check_mask_reaches(std::int64_t count) const {
    if (!options_.mask || options_.mask->sizes[3] == 1) return;
    if (next_key() + count > options_.mask->sizes[3]) {
      throw InvalidArgument("mask", "expected a mask over at least " +
                                        std::to_string(next_key() + count) + " keys, got " +
                                        std::to_string(options_.mask->sizes[3]));
    }
  }

  static void check_position(const char* name, std::int64_t key, std::int64_t least,
                             std::int64_t split_len) {
    if (key >= least && key <= core::kUnknownLength && key % split_len == 0) return;
    throw InvalidArgument(name, "expected a multiple of split_len = " + std::to_string(split_len) +
                                    " from " + std::to_string(least) + " to 2^60, got " +
                                    std::to_string(key));
  }

  /// Begins on the backend `home`, unless the options name another. An error leaves no trace.
  void begin(const AttentionShape& shape, const std::string& home,
             const core::KeySource* source = nullptr) {
    auto session = std::make_unique<core::Session>(core::make_problem(shape, &q_, options_),
                                                   options_.run, home);
    if (source) session->check_reaches(*source);
    const std::int64_t split_len = session->kernel().split_len;  // the backend may be another now
    check_position("first_key", tail_begin_, 0, split_len);
    const std::vector<core::Block> blocks = session->blocks();
    if (blocks.size() != 1) {
      const core::Block all{0, session->problem().num_groups(), 0, shape.q_len};
      throw InvalidArgument("max_scratch_bytes",
                            "expected at least " + std::to_string(session->scratch_bytes({all})) +
                                " for the state of all query rows, got " +
                                std::to_string(session->settings().max_scratch_bytes));
    }
    auto run = session->begin(blocks.front());
    tail_.emplace(shape, split_len);
    split_len_ = split_len;
    shape_ = shape;
    block_ = blocks.front();
    session_ = std::move(session);
    run_ = std::move(run);
  }

  void clear(std::int64_t key) {
    tail_begin_ = key;
    shape_.num_kv_heads = shape_.value_dim = 0;
    run_.reset();
    session_.reset();
    tail_.reset();
  }

  void fold(const core::KeySource& source, core::KeyRange keys) {
    session_->fold(*run_, block_, source, keys);
    session_->keep(*run_);
  }

  void append(const core::KeySource& source, core::KeyRange rows) {
    tail_->append(source, rows, session_->problem().key_limit);
  }

  void fold_tail() {
    const std::int64_t end = next_key();
    if (end > tail_begin_) fold(tail_->source(tail_begin_), {tail_begin_, end});
    tail_->clear();
    tail_begin_ = end;
  }

  TensorView q_;
  AttentionOptions options_;
  std::vector<std::int64_t> kv_lens_;
  AttentionShape shape_;        // num_kv_heads and value_dim are 0 until the first update
  std::int64_t split_len_ = 1;  // of the kernel; before the first update, of a likely one
  std::int64_t first_key_;
  std::int64_t tail_begin_;  // absolute position of the tail's first key
  bool usable_ = true;
  core::Block block_;
  std::unique_ptr<core::Session> session_;
  std::unique_ptr<core::Run> run_;  // refers to the session's problem
  std::optional<core::Tail> tail_;
};

AttentionState::AttentionState(const TensorView& q, const AttentionOptions& options,
                               std::int64_t first_key)
    : impl_(core::guard_memory([&] { return std::make_unique<Impl>(q, options, first_key); })) {}
AttentionState::~AttentionState() = default;
AttentionState::AttentionState(AttentionState&&) noexcept = default;
AttentionState& AttentionState::operator=(AttentionState&&) noexcept = default;

void AttentionState::update(const TensorView& k, const TensorView& v) {
  core::guard_memory([&] { impl_->update(k, v); });
}

void AttentionState::skip_to(std::int64_t key) {
  core::guard_memory([&] { impl_->skip_to(key); });
}

void AttentionState::save(const StateView& to) {
  core::guard_memory([&] { impl_->save(to); });
}

void AttentionState::load(const StateView& from, std::int64_t num_kv_heads) {
  core::guard_memory([&] { impl_->load(from, num_kv_heads); });
}

void AttentionState::merge(AttentionState&& other) {
  core::guard_memory([&] { impl_->merge(*other.impl_); });
}

Report AttentionState::finish(const MutableTensorView& out,
                              const std::optional<MutableTensorView>& lse) {
  return core::guard_memory([&] { return impl_->finish(out, lse); });
}

std::int64_t AttentionState::next_key() const noexcept { return impl_->next_key(); }

}  // namespace keyfold

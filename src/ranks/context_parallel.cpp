// A call of all ranks: check, agree, run, hand out.
#include "keyfold/context_parallel.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <sstream>
#include <utility>

#include "core/device_memory.hpp"
#include "core/guard.hpp"
#include "core/half.hpp"
#include "core/validate.hpp"
#include "ranks/agreement.hpp"
#include "ranks/merge.hpp"

namespace keyfold {
namespace ranks {
namespace {

void check(const char* name, bool good, const char* expected, double got) {
  if (good) return;
  std::ostringstream message;
  message << "expected " << expected << ", got " << got;
  throw InvalidArgument(name, message.str());
}

/// This rank's tensors by themselves; what they have in common with others' comes later.
void check_tensors(const TensorView& q, const TensorView& k, const TensorView& v,
                   const MutableTensorView& out, const ContextParallelOptions& options) {
  check("stripe_len", options.stripe_len >= 0, "at least 0",
        static_cast<double>(options.stripe_len));
  check("row_stripe_len", options.row_stripe_len >= 0, "at least 0",
        static_cast<double>(options.row_stripe_len));
  check("block_bytes", options.block_bytes >= 1, "at least 1",
        static_cast<double>(options.block_bytes));
  check("timeout_seconds", options.timeout_seconds > 0 && std::isfinite(options.timeout_seconds),
        "a number above 0", options.timeout_seconds);
  if (options.attention.device_kv_lens != nullptr) {
    throw InvalidArgument("device_kv_lens", "expected kv_lens in host memory, got them elsewhere");
  }
  TensorView one_row = q;  // a rank may have none
  if (options.queries == Queries::kOwn && q.sizes[2] == 0) one_row.sizes[2] = 1;
  AttentionShape shape;
  shape.batch = one_row.sizes[0];
  shape.num_heads = one_row.sizes[1];
  shape.num_kv_heads = k.sizes[1];
  shape.q_len = one_row.sizes[2];
  shape.kv_len = k.sizes[2];
  shape.head_dim = one_row.sizes[3];
  shape.value_dim = v.sizes[3];
  shape.dtype = q.dtype;
  core::make_problem(shape, nullptr, {});  // checks the shape
  core::check_view("q", q);
  core::check_keys(shape, k, v);
  shape.q_len = q.sizes[2];
  core::check_output(shape, out, options.attention.lse);
  // fields_of() reads these.
  if (options.attention.sinks) core::check_view("sinks", *options.attention.sinks);
  core::check_on_host("kv_lens", options.attention.kv_lens.data());
}

template <class T>
std::string text(const T& value) {
  std::ostringstream stream;
  stream.precision(17);
  stream << value;
  return stream.str();
}
template <class T>
std::string text(const std::optional<T>& value) {
  return value ? text(*value) : "none";
}
std::string text(const Dims& sizes) {
  return '[' + text(sizes[0]) + ", " + text(sizes[1]) + ", " + text(sizes[2]) + ", " +
         text(sizes[3]) + ']';
}
std::string text(const std::optional<TensorView>& tensor) {
  return tensor ? std::string(name_of(tensor->dtype)) + ' ' + text(tensor->sizes) : "none";
}

std::string sinks_text(const std::optional<TensorView>& sinks) {
  std::string result = text(sinks);
  if (!sinks || sinks->dtype == DType::kBool) return result;
  for (std::int64_t h = 0; h < sinks->sizes[1]; ++h) {
    result += ' ' + text(core::load_float(core::element(*sinks, 0, h, 0, 0), sinks->dtype));
  }
  return result;
}

/// All that must be the same on every rank.
std::vector<Field> fields_of(const TensorView& q, const TensorView& k, const TensorView& v,
                             const ContextParallelOptions& options) {
  const AttentionOptions& a = options.attention;
  const bool own = options.queries == Queries::kOwn;
  std::vector<Field> fields = {
      {"queries", own ? "own" : "replicated"},
      {"order", options.order == MergeOrder::kOrdered ? "ordered" : "reduce"},
      {"stripe_len", text(options.stripe_len)},
      {"row_stripe_len", text(own ? options.row_stripe_len : 0)},
      {"block_bytes", text(options.block_bytes)},
      {"dtype", std::string(name_of(q.dtype))},
      {"batch", text(q.sizes[0])},
      {"num_heads", text(q.sizes[1])},
      {"num_kv_heads", text(k.sizes[1])},
      {"q_len", own ? "any" : text(q.sizes[2])},
      {"head_dim", text(q.sizes[3])},
      {"value_dim", text(v.sizes[3])},
      {"scale", text(a.scale)},
      {"causal", text(a.causal)},
      {"q_offset", text(a.q_offset)},
      {"window.left", text(a.window.left)},
      {"window.right", text(a.window.right)},
      {"softcap", text(a.softcap)},
      {"mask", text(a.mask)},
      {"sinks", sinks_text(a.sinks)},
  };
  std::string lengths = a.kv_lens.empty() ? "none" : "";
  for (const std::int64_t length : a.kv_lens) lengths += text(length) + ' ';
  fields.push_back({"kv_lens", lengths});
  return fields;
}

void run(Channel& channel, const TensorView& q, const TensorView& k, const TensorView& v,
         const MutableTensorView& out, const ContextParallelOptions& options,
         ContextParallelReport& result) {
  std::exception_ptr failure;
  std::vector<Field> fields;
  try {
    check_tensors(q, k, v, out, options);
    fields = fields_of(q, k, v, options);
  } catch (...) {
    failure = std::current_exception();
  }
  const Shares shares = agree(channel, fields, k.sizes[2], q.sizes[2], failure);

  // What is thrown from here to the job is thrown by all ranks: all have the same numbers.
  const bool own = options.queries == Queries::kOwn;
  std::vector<Owned> owned{{Slice::kAll, 0, shares.q_len.front(), 0}};
  if (own) owned = owned_rows(shares.q_len, options.row_stripe_len);
  AttentionShape shape;
  shape.batch = q.sizes[0];
  shape.num_heads = q.sizes[1];
  shape.num_kv_heads = k.sizes[1];
  shape.q_len = own ? std::accumulate(shares.q_len.begin(), shares.q_len.end(), std::int64_t{0})
                    : shares.q_len.front();
  shape.kv_len = std::accumulate(shares.kv_len.begin(), shares.kv_len.end(), std::int64_t{0});
  shape.head_dim = q.sizes[3];
  shape.value_dim = v.sizes[3];
  shape.dtype = q.dtype;
  result.kv_len = shape.kv_len;
  std::vector<Segment> segments = segments_of(shares.kv_len, options.stripe_len);
  Job job(channel, core::make_problem(shape, nullptr, options.attention), q, k, v, out, options,
          std::move(segments), std::move(owned));
  if (options.order == MergeOrder::kReduce) {
    merge_by_reductions(job, options.block_bytes);
  } else if (job.own_rows()) {
    fold_passing_keys(job, options.block_bytes);
  } else {
    merge_in_order(job, options.block_bytes);
  }
  job.rethrow();
  job.commit();
  result.report = job.report();
}

}  // namespace
}  // namespace ranks

class ContextParallel::Impl {
 public:
  explicit Impl(std::unique_ptr<Transport> transport) : transport_(std::move(transport)) {
    if (!transport_) throw InvalidArgument("transport", "expected a transport, got none");
  }

  const Transport& transport() const { return *transport_; }

  ContextParallelReport run(const TensorView& q, const TensorView& k, const TensorView& v,
                            const MutableTensorView& out, const ContextParallelOptions& options) {
    const auto start = std::chrono::steady_clock::now();
    ContextParallelReport result;
    together(options.timeout_seconds, [&](ranks::Channel& channel) {
      ranks::run(channel, q, k, v, out, options, result);
      result.messages = channel.messages();
      result.message_bytes = channel.message_bytes();
      result.waiting_ms = channel.waiting_seconds() * 1e3;
    });
    result.report.elapsed_ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    return result;
  }

  void fail(const std::exception_ptr& failure, double timeout_seconds) {
    together(timeout_seconds,
             [&](ranks::Channel& channel) { ranks::agree(channel, {}, 0, 0, failure); });
  }

 private:
  template <class Body>
  void together(double timeout_seconds, const Body& body) {
    if (broken_) {
      throw InvalidArgument("ranks",
                            "expected ranks that can work together, but an earlier call "
                            "ended in the middle; end the process");
    }
    ranks::Channel channel(*transport_, timeout_seconds > 0
                                            ? timeout_seconds
                                            : ContextParallelOptions().timeout_seconds);
    try {
      body(channel);
    } catch (...) {
      broken_ = !channel.give_up();
      throw;
    }
  }

  std::unique_ptr<Transport> transport_;
  bool broken_ = false;
};

ContextParallel::ContextParallel(std::unique_ptr<Transport> transport)
    : impl_(std::make_unique<Impl>(std::move(transport))) {}
ContextParallel::~ContextParallel() = default;
ContextParallel::ContextParallel(ContextParallel&&) noexcept = default;
ContextParallel& ContextParallel::operator=(ContextParallel&&) noexcept = default;

int ContextParallel::rank() const noexcept { return impl_->transport().rank(); }
int ContextParallel::num_ranks() const noexcept { return impl_->transport().num_ranks(); }

ContextParallelReport ContextParallel::scaled_dot_product_attention(
    const TensorView& q, const TensorView& k, const TensorView& v, const MutableTensorView& out,
    const ContextParallelOptions& options) {
  return core::guard_memory([&] { return impl_->run(q, k, v, out, options); });
}

void ContextParallel::fail(const std::exception_ptr& failure, double timeout_seconds) {
  if (!failure) throw InvalidArgument("failure", "expected an exception, got none");
  impl_->fail(failure, timeout_seconds);
}

}  // namespace keyfold

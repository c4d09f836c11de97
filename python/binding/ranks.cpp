// ContextParallel for Python.
#include "ranks.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <utility>
#include <vector>

#include "gil.hpp"
#include "raised.hpp"
#include "transport.hpp"
#include "watcher.hpp"

namespace keyfold::python {
namespace {

/// A call's tensors, and the memory of them.
struct Tensors {
  Tensors(const nb::object& queries, const nb::object& keys, const nb::object& values,
          const nb::object& result, const nb::object& sums)
      : arrays{Array::to_read(queries, "q"), Array::to_read(keys, "k"), Array::to_read(values, "v"),
               Array::to_write(result, "out")},
        q(arrays[0].view()),
        k(arrays[1].view()),
        v(arrays[2].view()),
        out(arrays[3].view()) {
    if (sums.is_none()) return;
    arrays.push_back(Array::to_write(sums, "lse"));
    lse = arrays.back().view(kLseAxes);
  }

  std::vector<Array> arrays;
  MutableTensorView q, k, v, out;
  std::optional<MutableTensorView> lse;
};

std::vector<std::pair<std::int64_t, std::int64_t>> as_pairs(const std::vector<KeySpan>& spans) {
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
  for (const KeySpan& span : spans) pairs.emplace_back(span.begin, span.end);
  return pairs;
}

}  // namespace

Ranks::Ranks(nb::object operations)
    : ranks_(std::make_unique<PythonTransport>(std::move(operations))) {}

ContextParallelReport Ranks::attention(const nb::object& q, const nb::object& k,
                                       const nb::object& v, const nb::object& out,
                                       const nb::object& lse, const Options& options,
                                       const nb::object& progress, const Sharing& sharing) {
  std::optional<Tensors> tensors;
  std::exception_ptr failure;
  try {
    tensors.emplace(q, k, v, out, lse);
  } catch (...) {
    failure = std::current_exception();
  }
  Watcher watcher(progress);
  ContextParallelOptions call;
  call.queries = sharing.own_queries ? Queries::kOwn : Queries::kReplicated;
  call.order = sharing.ordered ? MergeOrder::kOrdered : MergeOrder::kReduce;
  call.stripe_len = sharing.stripe_len;
  call.row_stripe_len = sharing.row_stripe_len;
  call.block_bytes = sharing.block_bytes;
  call.timeout_seconds = sharing.timeout_seconds;
  call.attention = options.for_call();
  call.attention.run.progress = [&watcher](const Progress& now) { raising([&] { watcher(now); }); };
  const GilReleased no_gil;
  if (failure) ranks_.fail(failure, sharing.timeout_seconds);
  call.attention.lse = tensors->lse;
  return ranks_.scaled_dot_product_attention(tensors->q, tensors->k, tensors->v, tensors->out,
                                             call);
}

void Ranks::fail(const nb::object& error, double timeout_seconds) {
  PyErr_SetObject(error.type().ptr(), error.ptr());
  const std::exception_ptr failure = std::make_exception_ptr(Raised(nb::python_error()));
  const GilReleased no_gil;
  ranks_.fail(failure, timeout_seconds);
}

void bind_ranks(nb::module_& module) {
  using nb::arg;
  nb::class_<Ranks>(module, "Ranks")
      .def(nb::init<nb::object>(), arg("operations"))
      .def(
          "attention",
          [](Ranks& self, const nb::object& q, const nb::object& k, const nb::object& v,
             const nb::object& out, const nb::object& lse, const Options& options,
             const nb::object& progress, bool own_queries, bool ordered, std::int64_t stripe_len,
             std::int64_t row_stripe_len, std::int64_t block_bytes, double timeout) {
            const ContextParallelReport report = self.attention(
                q, k, v, out, lse, options, progress,
                {own_queries, ordered, stripe_len, row_stripe_len, block_bytes, timeout});
            keep_report(report.report);
            return as_tuple(report);
          },
          arg("q").none(), arg("k").none(), arg("v").none(), arg("out"), arg("lse").none(),
          arg("options"), arg("progress").none(), nb::kw_only(), arg("own_queries"), arg("ordered"),
          arg("stripe_len"), arg("row_stripe_len"), arg("block_bytes"), arg("timeout"))
      .def("fail", &Ranks::fail, arg("error"), arg("timeout"))
      .def_prop_ro("rank", &Ranks::rank)
      .def_prop_ro("num_ranks", &Ranks::num_ranks);
  module.def(
      "shard_keys",
      [](std::int64_t kv_len, int num_ranks, int rank, std::int64_t split_len,
         std::int64_t stripe_len) {
        return as_pairs(shard_keys(kv_len, num_ranks, rank, split_len, stripe_len));
      },
      arg("kv_len"), arg("num_ranks"), arg("rank"), arg("split_len"), arg("stripe_len"));
  module.def(
      "shard_rows",
      [](std::int64_t q_len, int num_ranks, int rank, std::int64_t row_stripe_len) {
        return as_pairs(shard_rows(q_len, num_ranks, rank, row_stripe_len));
      },
      arg("q_len"), arg("num_ranks"), arg("rank"), arg("row_stripe_len"));
}

}  // namespace keyfold::python

// ContextParallel for Python.
#pragma once

#include <exception>
#include <keyfold/context_parallel.hpp>
#include <string>

#include "options.hpp"
#include "records.hpp"

namespace keyfold::python {

class Ranks {
 public:
  /// `operations`: see PythonTransport.
  explicit Ranks(nb::object operations);

  int rank() const { return ranks_.rank(); }
  int num_ranks() const { return ranks_.num_ranks(); }

  /// How the ranks share a call: ContextParallelOptions without what one process has too.
  struct Sharing {
    bool own_queries, ordered;
    std::int64_t stripe_len, row_stripe_len, block_bytes;
    double timeout_seconds;
  };
  ContextParallelReport attention(const nb::object& q, const nb::object& k, const nb::object& v,
                                  const nb::object& out, const nb::object& lse,
                                  const Options& options, const nb::object& progress,
                                  const Sharing& sharing);
  /// Raises `error`, and lets the other ranks know.
  void fail(const nb::object& error, double timeout_seconds);

 private:
  ContextParallel ranks_;
};

void bind_ranks(nb::module_& module);

}  // namespace keyfold::python

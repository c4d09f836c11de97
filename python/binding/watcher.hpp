// What happens between dispatches: Python's signal handlers, and the caller's callback.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <keyfold/error.hpp>

namespace keyfold::python {

/// Made with the GIL held, called without it. What Python raises ends the call and passes through.
class Watcher {
 public:
  /// `callback` is None, or takes the fields of Progress in their order.
  explicit Watcher(nanobind::object callback);

  void operator()(const Progress& progress);

 private:
  using Clock = std::chrono::steady_clock;

  nanobind::object callback_;
  bool signals_;  // Python handles them on its main thread only
  Clock::time_point last_ = Clock::now();
};

}  // namespace keyfold::python

// What happens between dispatches.
#include "watcher.hpp"

#include "gil.hpp"

namespace keyfold::python {
namespace nb = nanobind;
namespace {

/// Taking the GIL more often than this would hold up short dispatches.
constexpr std::chrono::milliseconds kBetweenSignalChecks{10};

bool on_main_thread() {
  const nb::object main = nb::module_::import_("threading").attr("main_thread")();
  return nb::cast<unsigned long>(main.attr("ident")) == PyThread_get_thread_ident();
}

}  // namespace

Watcher::Watcher(nb::object callback)
    : callback_(std::move(callback)), signals_(on_main_thread()) {}

void Watcher::operator()(const Progress& p) {
  const Clock::time_point now = Clock::now();
  const bool signals = signals_ && now - last_ >= kBetweenSignalChecks;
  if (!signals && callback_.is_none()) return;
  last_ = now;
  const GilHeld gil;
  outliving_python([&] {
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (callback_.is_none()) return;
    callback_(p.dispatches, p.fraction, p.elapsed_ms, p.last_dispatch_ms, p.longest_dispatch_ms,
              p.next_row, p.next_key);
  });
}

}  // namespace keyfold::python

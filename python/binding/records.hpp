// The library's records as tuples of their fields, in order, for keyfold/_records.py.
#pragma once

#include <nanobind/nanobind.h>

#include <keyfold/attention.hpp>
#include <keyfold/context_parallel.hpp>
#include <keyfold/plan.hpp>
#include <optional>

namespace keyfold::python {

using Fields = nanobind::typed<nanobind::tuple, nanobind::any, nanobind::ellipsis>;

Fields as_tuple(const Plan& plan);
Fields as_tuple(const DeviceInfo& device);
Fields as_tuple(const ContextParallelReport& report);

/// Keeps the report of this thread's last call that succeeded; last_report() is None before any.
void keep_report(Report report);
std::optional<Fields> last_report();

}  // namespace keyfold::python

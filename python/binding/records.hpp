// The library's records as tuples of their fields, in order, for keyfold/_records.py.
#pragma once

#include <nanobind/nanobind.h>

#include <keyfold/attention.hpp>
#include <keyfold/plan.hpp>

namespace keyfold::python {

nanobind::tuple as_tuple(const Plan& plan);
nanobind::tuple as_tuple(const DeviceInfo& device);

/// Keeps the report of this thread's last call that succeeded; last_report() is None before any.
void keep_report(Report report);
nanobind::object last_report();

}  // namespace keyfold::python

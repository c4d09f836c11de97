// Compiling a GPU's kernels ahead of the first call that needs them.
#pragma once

#include <keyfold/plan.hpp>
#include <stop_token>

namespace keyfold::cli {

/// Runs a small call of each common kind on the device, so that its kernels are made and kept in
/// the cache on disk. Returns the number of calls; 0 where nothing has to be compiled (the CPU).
int warm(const DeviceInfo& device, const std::stop_token& stop_token);

}  // namespace keyfold::cli

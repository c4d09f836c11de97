// How much memory the machine has to give, and how much the process has taken.
#pragma once

#include <cstdint>

namespace keyfold::cli {

/// Bytes that can be allocated without swapping; 0 when the system does not say.
std::int64_t memory_available();

/// Most bytes that the process had in memory since reset_peak_memory(), or since its start where
/// that is not allowed; 0 when the system does not say.
std::int64_t peak_memory();
void reset_peak_memory();

}  // namespace keyfold::cli

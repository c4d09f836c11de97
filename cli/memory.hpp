// How much memory the machine has to give.
#pragma once

#include <cstdint>

namespace keyfold::cli {

/// Bytes that can be allocated without swapping; 0 when the system does not say.
std::int64_t memory_available();

}  // namespace keyfold::cli

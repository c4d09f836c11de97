// How much of its files the process can keep in memory.
#pragma once

#include <cstdint>

namespace keyfold::store {

/// Bytes that are available to the page cache: what the system and the limits of the process's
/// memory groups (cgroup v1 or v2) leave. Reads a few small files.
std::int64_t page_cache_bytes();

}  // namespace keyfold::store

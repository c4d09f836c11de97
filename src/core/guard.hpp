// Turns std::bad_alloc into keyfold's own error at the edge of the library.
#pragma once

#include <new>
#include <stdexcept>

#include "keyfold/error.hpp"

namespace keyfold::core {

/// body(), with std::bad_alloc (and sizes no allocator takes) as RunError(kOutOfMemory).
template <class Body>
decltype(auto) guard_memory(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    throw RunError(ErrorCode::kOutOfMemory,
                   "out of memory for scratch; lower max_scratch_bytes or free memory");
  } catch (const std::length_error&) {
    throw RunError(ErrorCode::kOutOfMemory, "scratch is larger than any allocation can be");
  }
}

}  // namespace keyfold::core

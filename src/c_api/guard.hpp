// Keeps exceptions inside the library: each function of the C API runs its body in guarded().
#pragma once

#include "keyfold/error.hpp"
#include "keyfold/keyfold.h"

namespace keyfold::c_api {

/// Inside a catch block: stores the message of the exception for keyfold_last_error() and returns
/// its status. Allocates nothing.
keyfold_status record_current_exception() noexcept;

/// Runs body and turns what it throws into a status.
template <typename Body>
keyfold_status guarded(Body&& body) noexcept {
  try {
    body();
    return KEYFOLD_OK;
  } catch (...) {
    return record_current_exception();
  }
}

/// *pointer; throws InvalidArgument that names the argument when it is NULL.
template <typename T>
T& deref(T* pointer, const char* argument) {
  if (pointer == nullptr) throw InvalidArgument(argument, "expected a pointer, got NULL");
  return *pointer;
}

/// The body of a *_create function: *handle = make(). Checks the pointer before it makes anything,
/// which a plain assignment would not, as C++ evaluates its right side first.
template <typename Handle, typename Make>
keyfold_status create(Handle** handle, const char* argument, Make&& make) noexcept {
  return guarded([&] {
    Handle*& target = deref(handle, argument);
    target = make();
  });
}

}  // namespace keyfold::c_api

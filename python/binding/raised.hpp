// What Python raises while other ranks listen.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "gil.hpp"

namespace keyfold::python {

/// Passes through like any, and tells the other ranks one line instead of a traceback.
class Raised : public nanobind::python_error {
 public:
  /// With the GIL held.
  explicit Raised(const nanobind::python_error& error)
      : nanobind::python_error(error),
        text_(nanobind::cast<std::string>(error.type().attr("__name__")) + ": " +
              nanobind::cast<std::string>(nanobind::str(error.value()))) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

/// body(), which runs Python, and whose errors come as Raised.
template <class Body>
auto raising(const Body& body) {
  try {
    return outliving_python(body);
  } catch (const nanobind::python_error& error) {
    const GilHeld gil;
    throw Raised(error);
  }
}

}  // namespace keyfold::python

// What went wrong with a file.
#pragma once

#include <string>
#include <system_error>

#include "keyfold/error.hpp"

namespace keyfold {

/// A file could not be opened, mapped, read, written or renamed, or changed while it was in use;
/// the message names it, what was tried, and the system's reason or what was expected and what
/// came. What is wrong inside a file from the beginning is an InvalidArgument that names the file.
class KEYFOLD_API IoError : public RunError {
 public:
  IoError(const std::string& action, const std::string& path, int error_number)
      : IoError("cannot " + action + " " + path + ": " +
                std::generic_category().message(error_number)) {}
  explicit IoError(const std::string& message) : RunError(ErrorCode::kInvalidArgument, message) {}
};

}  // namespace keyfold

// What the operating system refused to do with a file.
#pragma once

#include <string>
#include <system_error>

#include "keyfold/error.hpp"

namespace keyfold::io {

/// A file could not be opened, mapped, written or renamed; the message names the action, the path
/// and the system's reason. What is wrong inside a file is an InvalidArgument that names the file.
class IoError : public RunError {
 public:
  IoError(const std::string& action, const std::string& path, int error_number)
      : RunError(ErrorCode::kInvalidArgument, "cannot " + action + " " + path + ": " +
                                                  std::generic_category().message(error_number)) {}
};

}  // namespace keyfold::io

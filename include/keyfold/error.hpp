// What keyfold throws. Every exception is a std::exception and a keyfold::Error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "keyfold/export.h"

namespace keyfold {

/// The kind of an error; the C API returns the same numbers.
enum class ErrorCode : int {
  kInvalidArgument = 1,  ///< an argument, option or environment value is wrong
  kUnsupported = 2,      ///< no backend here can do this; the message says what would work
  kCancelled = 3,        ///< the stop token was set; `out` is untouched
  kOutOfMemory = 4,      ///< host or device memory ran out
  kDeviceFailure = 5,    ///< the device failed while it ran a dispatch
  kInternal = 6,         ///< a defect in keyfold
  kPeerFailure = 7,      ///< another rank failed or does not answer; not from the C API
};

/// Common base of all errors, beside std::exception: `catch (const keyfold::Error&)` takes them
/// all. It is no std::exception itself, so that each error has exactly one such base.
class KEYFOLD_API Error {
 public:
  virtual ~Error() = default;
  /// The kind.
  virtual ErrorCode code() const noexcept = 0;
  /// What was expected, what came, and what to do.
  virtual const char* what() const noexcept = 0;
};

/// A wrong argument: the message names it, what was expected and what came.
class KEYFOLD_API InvalidArgument : public std::invalid_argument, public Error {
 public:
  InvalidArgument(std::string argument, const std::string& message)
      : std::invalid_argument(argument + ": " + message), argument_(std::move(argument)) {}
  ErrorCode code() const noexcept override { return ErrorCode::kInvalidArgument; }
  const char* what() const noexcept override { return std::invalid_argument::what(); }
  /// The argument's (or environment variable's) name.
  const std::string& argument() const noexcept { return argument_; }

 private:
  std::string argument_;
};

/// A failure that is not the caller's: unsupported, out of memory, a lost device.
class KEYFOLD_API RunError : public std::runtime_error, public Error {
 public:
  RunError(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept override { return code_; }
  const char* what() const noexcept override { return std::runtime_error::what(); }

 private:
  ErrorCode code_;
};

/// How far a call has come; passed to the progress callback and kept by Cancelled.
struct Progress {
  std::int64_t dispatches = 0;     ///< dispatches finished so far
  double fraction = 0;             ///< share of the visible query-key pairs done, 0 to 1; goes back
                                   ///< when a lost device is replaced, and next_key with it
  double elapsed_ms = 0;           ///< wall time since the call began
  double last_dispatch_ms = 0;     ///< device time of the last dispatch
  double longest_dispatch_ms = 0;  ///< longest device time of a dispatch so far
  std::int64_t next_row = 0;       ///< query rows below this one are finished
  std::int64_t next_key = 0;       ///< keys below this one are folded into the rows in flight
};

/// The stop token was set. `out` and `lse` are as they were before the call.
class KEYFOLD_API Cancelled : public RunError {
 public:
  Cancelled(const std::string& message, const Progress& where)
      : RunError(ErrorCode::kCancelled, message), where_(where) {}
  /// Where the call stopped.
  const Progress& where() const noexcept { return where_; }

 private:
  Progress where_;
};

/// Other ranks failed, or do not answer; see ContextParallel.
class KEYFOLD_API PeerError : public RunError {
 public:
  PeerError(const std::string& message, std::vector<int> ranks)
      : RunError(ErrorCode::kPeerFailure, message), ranks_(std::move(ranks)) {}
  /// Which; empty where that could not be found out.
  const std::vector<int>& ranks() const noexcept { return ranks_; }

 private:
  std::vector<int> ranks_;
};

}  // namespace keyfold

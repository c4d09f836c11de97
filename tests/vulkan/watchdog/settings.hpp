// What the watchdog layer is told by its environment.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace keyfold::watchdog {

/// Appends whole lines to a file that several processes may share; without a path, to nothing.
class Log {
 public:
  Log() = default;
  /// Throws std::runtime_error if the file cannot be opened.
  explicit Log(const char* path);
  ~Log();
  Log(Log&& other) noexcept;
  Log& operator=(Log&& other) noexcept;

  void line(std::string text) const;

 private:
  int file_ = -1;
};

/// Submissions are the batches of vkQueueSubmit and vkQueueSubmit2 that hold a command buffer,
/// counted from 1 through the whole process.
struct Settings {
  std::optional<double> limit_ms;       // KEYFOLD_WATCHDOG_MS: longer ones lose the device
  std::vector<std::uint64_t> lose_at;   // KEYFOLD_WATCHDOG_LOSE_AT: and these, however short
  std::optional<std::uint64_t> oom_at;  // KEYFOLD_WATCHDOG_OOM_AT: this one is refused
  std::optional<std::uint64_t> no_memory_over;  // KEYFOLD_WATCHDOG_NO_MEMORY_OVER: bytes at once
  Log log;                                      // KEYFOLD_WATCHDOG_LOG
};

/// Throws std::runtime_error for a value that does not parse and for a KEYFOLD_WATCHDOG_ variable
/// that does not exist.
Settings read_settings();

}  // namespace keyfold::watchdog

// The environment, read and checked.
#include "settings.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace keyfold::watchdog {
namespace {

constexpr std::string_view kPrefix = "KEYFOLD_WATCHDOG_";

[[noreturn]] void refuse(std::string_view variable, std::string_view value, const char* expected) {
  throw std::runtime_error(std::string(variable) + ": expected " + expected + ", got '" +
                           std::string(value) + "'");
}

template <class Number>
Number number(std::string_view variable, std::string_view value, const char* expected) {
  Number parsed{};
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, parsed);
  if (error != std::errc{} || stop != end || !(parsed > 0)) refuse(variable, value, expected);
  return parsed;
}

void set(Settings& settings, std::string_view variable, std::string_view value) {
  const std::string_view name = variable.substr(kPrefix.size());
  const char* const count = "a whole number above 0";
  if (name == "MS") {
    const char* const expected = "a number of milliseconds above 0";
    settings.limit_ms = number<double>(variable, value, expected);
    if (!std::isfinite(*settings.limit_ms)) refuse(variable, value, expected);
  } else if (name == "LOSE_AT") {
    for (std::string_view rest = value;; rest.remove_prefix(rest.find(',') + 1)) {
      settings.lose_at.push_back(number<std::uint64_t>(variable, rest.substr(0, rest.find(',')),
                                                       "whole numbers above 0, divided by commas"));
      if (rest.find(',') == std::string_view::npos) break;
    }
  } else if (name == "OOM_AT") {
    settings.oom_at = number<std::uint64_t>(variable, value, count);
  } else if (name == "NO_MEMORY_OVER") {
    settings.no_memory_over = number<std::uint64_t>(variable, value, "a number of bytes above 0");
  } else if (name == "LOG") {
    settings.log = Log(value.data());
  } else {
    throw std::runtime_error("there is no " + std::string(variable) +
                             "; there are MS, LOG, LOSE_AT, OOM_AT and NO_MEMORY_OVER");
  }
}

}  // namespace

Log::Log(const char* path) : file_(open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666)) {
  if (file_ < 0)
    throw std::runtime_error("KEYFOLD_WATCHDOG_LOG: cannot write " + std::string(path));
}

Log::~Log() {
  if (file_ >= 0) close(file_);
}

Log::Log(Log&& other) noexcept : file_(std::exchange(other.file_, -1)) {}

Log& Log::operator=(Log&& other) noexcept {
  std::swap(file_, other.file_);
  return *this;
}

void Log::line(std::string text) const {
  if (file_ < 0) return;
  text += '\n';
  // One call, so that lines of several threads and processes do not mix.
  [[maybe_unused]] const ssize_t written = write(file_, text.data(), text.size());
}

Settings read_settings() {
  Settings settings;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    if (!text.starts_with(kPrefix)) continue;
    const std::size_t equals = text.find('=');
    set(settings, text.substr(0, equals), text.substr(equals + 1));
  }
  return settings;
}

}  // namespace keyfold::watchdog

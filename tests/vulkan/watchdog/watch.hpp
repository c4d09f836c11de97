// For tests: turns the watchdog layer on for the Vulkan instances made in a scope, and reads its
// log.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "support/environment.hpp"

namespace keyfold::watchdog {

/// A line of the log.
struct Watched {
  std::uint64_t device = 0, submission = 0;  // in the process, from 1
  double device_ms = 0, wall_ms = 0;
  std::string end;  // empty, LOST, DROPPED (in flight when the device was lost) or REFUSED
};

class Watch {
 public:
  /// Of Settings (settings.hpp), without their prefix: {"MS", "50"}.
  using Variables = std::initializer_list<std::pair<const char*, std::string>>;

  explicit Watch(Variables variables = {}) : path_(next_path()) {
    const char* others = std::getenv("VK_INSTANCE_LAYERS");
    set("VK_LAYER_PATH", KEYFOLD_WATCHDOG_LAYER_PATH ":/usr/share/vulkan/explicit_layer.d");
    set("VK_INSTANCE_LAYERS",
        std::string("VK_LAYER_KEYFOLD_watchdog") + (others ? std::string(":") + others : ""));
    set("KEYFOLD_WATCHDOG_LOG", path_);
    for (const auto& [name, value] : variables) {
      set((std::string("KEYFOLD_WATCHDOG_") + name).c_str(), value);
    }
  }
  ~Watch() {
    std::remove(path_.c_str());
    while (!environment_.empty()) environment_.pop_back();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  /// All that ended so far and that the application waited for, in this order.
  std::vector<Watched> log() const {
    std::vector<Watched> lines;
    std::ifstream file(path_);
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string word;
      Watched watched;
      words >> word >> word;  // process N
      words >> word >> watched.device >> word >> watched.submission;
      words >> word >> watched.device_ms >> word >> watched.wall_ms >> watched.end;
      lines.push_back(watched);
    }
    return lines;
  }

  double longest_ms() const {
    double longest = 0;
    for (const Watched& watched : log()) longest = std::max(longest, watched.device_ms);
    return longest;
  }

 private:
  static std::string next_path() {
    static std::atomic<int> count = 0;
    return "watchdog_" + std::to_string(getpid()) + "_" + std::to_string(++count) + ".log";
  }

  void set(const char* name, const std::string& value) {
    environment_.emplace_back(name, value.c_str());
  }

  std::string path_;
  std::deque<test::ScopedEnv> environment_;  // undone in reverse
};

}  // namespace keyfold::watchdog

#include "memory.hpp"

#include <fstream>
#include <limits>
#include <string>
#include <string_view>

namespace keyfold::cli {

namespace {

/// A value in kB from one of Linux's lists "Name:  value", in bytes; 0 if it is not there.
std::int64_t proc_bytes(const char* path, std::string_view name) {
  std::ifstream file(path);
  for (std::string word; file >> word;) {
    if (std::int64_t kib = 0; word == name && file >> kib) return kib * 1024;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return 0;
}

}  // namespace

std::int64_t memory_available() { return proc_bytes("/proc/meminfo", "MemAvailable:"); }

std::int64_t peak_memory() { return proc_bytes("/proc/self/status", "VmHWM:"); }

void reset_peak_memory() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace keyfold::cli

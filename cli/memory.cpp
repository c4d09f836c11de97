#include "memory.hpp"

#include <fstream>
#include <limits>
#include <string>

namespace keyfold::cli {

std::int64_t memory_available() {
  std::ifstream file("/proc/meminfo");
  std::string name;
  for (std::int64_t kib = 0; file >> name >> kib;) {
    if (name == "MemAvailable:") return kib * 1024;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return 0;
}

}  // namespace keyfold::cli

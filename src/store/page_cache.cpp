// /proc/meminfo, and the limits of memory groups.
#include "store/page_cache.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace keyfold::store {
namespace {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();

/// The number that a file holds; no limit where it holds another word ("max"), or isn't there.
std::int64_t limit_in(const std::string& path) {
  std::ifstream file(path);
  std::int64_t bytes = 0;
  return file >> bytes ? bytes : kNoLimit;
}

/// The least limit of a group and those above it. In a container the path may be its host's, and
/// not be there; the group at the root is the container's own then.
std::int64_t limit_of_group(const std::string& root, std::string group, const char* name) {
  std::int64_t least = limit_in(root + name);
  while (group.size() > 1) {
    least = std::min(least, limit_in(root + group + name));
    group.erase(group.rfind('/'));
  }
  return least;
}

}  // namespace

std::int64_t page_cache_bytes() {
  std::int64_t least = kNoLimit;
  std::ifstream memory("/proc/meminfo");
  for (std::string word; memory >> word;) {
    std::int64_t kib = 0;
    if (word == "MemAvailable:" && memory >> kib) least = kib << 10;
  }
  // Lines "number:controllers:path"; version 2 names no controllers.
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers.find(",memory,") != std::string::npos) {
      least =
          std::min(least, limit_of_group("/sys/fs/cgroup/memory", path, "/memory.limit_in_bytes"));
    } else if (controllers == ",,") {
      least = std::min(least, limit_of_group("/sys/fs/cgroup", path, "/memory.max"));
    }
  }
  return least;
}

}  // namespace keyfold::store

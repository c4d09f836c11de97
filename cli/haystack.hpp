// The text that a needle is hidden in: real files.
#pragma once

#include <cstdint>
#include <stop_token>
#include <string>
#include <vector>

namespace keyfold::cli {

/// Text and where it came from.
struct Haystack {
  std::string text;
  std::int64_t files = 0;    ///< files read, the last one perhaps in part
  std::int64_t skipped = 0;  ///< files and directories inside the given ones that could not be read
};

/// Reads the files in order, directories recursively and sorted by name, until it has `bytes`
/// bytes. Inside directories, links to directories and special files are left out. Throws
/// InvalidArgument when all of it is too short, RunError for a path that cannot be read, and
/// Cancelled.
Haystack read_haystack(const std::vector<std::string>& paths, std::int64_t bytes,
                       const std::stop_token& stop_token);

}  // namespace keyfold::cli

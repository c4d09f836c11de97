// The text that a needle is hidden in: real files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <stop_token>
#include <string>
#include <vector>

#include "text.hpp"

namespace keyfold::cli {

/// The files of a text, in order, directories recursively and sorted by name, as far as it needs
/// them. Inside directories, links to directories and special files are left out.
class Haystack {
 public:
  /// Finds `bytes` bytes; reads only what is no regular file, a pipe say. Throws InvalidArgument
  /// when all of it is too short, RunError for a path that cannot be read, and Cancelled.
  Haystack(const std::vector<std::string>& paths, std::int64_t bytes,
           const std::stop_token& stop_token);

  /// The text; reading it throws RunError and Cancelled. Refers to this object.
  Text text() const;
  std::int64_t files() const { return static_cast<std::int64_t>(files_.size()); }
  /// Files and directories inside the given ones that could not be read.
  std::int64_t skipped() const { return skipped_; }

 private:
  struct File {
    std::filesystem::path path;
    std::int64_t begin = 0, end = 0;  // of the whole text
    std::string contents;             // of what can be read only once
  };
  std::error_code find(const std::filesystem::path& path);
  std::error_code find_file(const std::filesystem::path& path);
  std::error_code find_directory(const std::filesystem::path& path);
  std::string read(std::int64_t begin, std::int64_t end) const;

  std::int64_t wanted_;
  std::stop_token stop_token_;
  std::int64_t size_ = 0;
  std::int64_t skipped_ = 0;
  std::vector<File> files_;
};

}  // namespace keyfold::cli

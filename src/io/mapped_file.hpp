// A file mapped read-only into memory, so that it may be larger than memory.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace keyfold::io {

/// Owns the mapping. The file must not be truncated while it is mapped: the system then ends the
/// process (SIGBUS) at the next read of a lost page.
class MappedFile {
 public:
  /// Maps a regular file; an empty one gives empty bytes. Throws IoError, or InvalidArgument for a
  /// directory, pipe or device.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  /// The whole file.
  std::span<const std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace keyfold::io

// A file descriptor with reads and writes that are whole, or errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <string>

namespace keyfold::store {

class File {
 public:
  enum class Mode { kRead, kWrite, kCreate };

  /// Opens a regular file; kCreate makes it, and refuses one that is there. Throws IoError, or
  /// InvalidArgument for a directory, pipe or device.
  explicit File(std::string path, Mode mode = Mode::kRead);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return fd_; }
  std::int64_t size() const;

  /// Fills `to`, but ends where the file does; returns the bytes read.
  std::int64_t read(std::int64_t offset, std::span<std::byte> to) const;
  /// The same past the page cache, where the file system can. All of offset, size and address are
  /// multiples of 4096; the file may end within the last page.
  std::int64_t read_direct(std::int64_t offset, std::span<std::byte> to) const;
  /// Whether the byte is in the page cache.
  bool is_cached(std::int64_t offset) const;
  void write(std::int64_t offset, std::span<const std::byte> from);
  /// Cuts or grows the file; what it grows by reads as zeros and takes no room on the disk.
  void resize(std::int64_t size);
  /// Returns when all that was written is on the disk.
  void sync();
  /// Throws IoError unless the file still has `size` bytes.
  void check_reaches(std::int64_t size) const;

 private:
  std::string path_;
  int fd_;
  mutable std::once_flag direct_once_;
  mutable int direct_fd_ = -1;
};

}  // namespace keyfold::store

// An output file that appears under its name only when it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>

namespace keyfold::io {

/// Writes to a temporary file beside the target; publish() renames it over the target. Destroyed
/// before that, it removes the temporary and leaves the target as it was. All functions throw
/// IoError.
class AtomicFile {
 public:
  /// Creates the temporary, so that a place that cannot be written is found before any work. A
  /// target that exists must be a writable regular file, or a link to one; it keeps its mode.
  explicit AtomicFile(const std::filesystem::path& target);
  ~AtomicFile();
  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;

  /// The target, links resolved.
  const std::filesystem::path& target() const noexcept { return target_; }
  /// Claims disk space for the whole file, where the file system can; a full disk fails here.
  void reserve(std::int64_t bytes);
  /// Appends.
  void write(std::span<const std::byte> bytes);
  /// Hands everything to the disk; nothing can be written any more.
  void finish();
  /// Renames, after finish().
  void publish();

 private:
  std::filesystem::path target_;
  std::filesystem::path temporary_;  // empty when there is none to remove
  int fd_ = -1;
};

}  // namespace keyfold::io

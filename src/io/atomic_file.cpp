// Temporary file, fsync, rename.
#include "io/atomic_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "keyfold/io_error.hpp"

namespace keyfold::io {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostPerWrite = std::size_t{1} << 30;  // one write() takes less than 2 GiB

fs::path resolve(const fs::path& target) {
  std::error_code error;
  fs::path resolved = fs::weakly_canonical(fs::absolute(target, error), error);
  if (error) throw IoError("write", target.string(), error.value());
  return resolved;
}

}  // namespace

AtomicFile::AtomicFile(const fs::path& target) : target_(resolve(target)) {
  mode_t mode = 0;
  struct stat status {};
  if (::stat(target_.c_str(), &status) == 0) {
    if (!S_ISREG(status.st_mode)) {
      throw InvalidArgument(target.string(),
                            "expected a regular file or a new name to write to; "
                            "got a directory, pipe or device");
    }
    if (::access(target_.c_str(), W_OK) != 0) throw IoError("write", target.string(), errno);
    mode = status.st_mode & 07777;
  }

  static std::atomic<unsigned> serial{0};
  do {
    temporary_ = target_.parent_path() / fmt::format(".keyfold-{}-{}.tmp", ::getpid(), serial++);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EEXIST);  // left by a process of the same number that was killed
  if (fd_ < 0) throw IoError("write", target.string(), errno);
  if (mode != 0) ::fchmod(fd_, mode);
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : target_(std::move(other.target_)),
      temporary_(std::exchange(other.temporary_, {})),
      fd_(std::exchange(other.fd_, -1)) {}

void AtomicFile::reserve([[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  int result = 0;
  do {
    result = ::fallocate(fd_, 0, 0, bytes);
  } while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
    throw IoError(fmt::format("reserve {} bytes for", bytes), target_.string(), errno);
  }
#endif
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_, bytes.data(), std::min(bytes.size(), kMostPerWrite));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw IoError("write", target_.string(), errno);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void AtomicFile::finish() {
  if (::fsync(fd_) != 0) throw IoError("write", target_.string(), errno);
  if (::close(std::exchange(fd_, -1)) != 0) throw IoError("write", target_.string(), errno);
}

void AtomicFile::publish() {
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    throw IoError("write", target_.string(), errno);
  }
  temporary_.clear();
}

}  // namespace keyfold::io

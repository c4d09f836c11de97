// Whole reads and writes, or errors that name the file.
#include "store/file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "keyfold/io_error.hpp"

namespace keyfold::store {
namespace {

constexpr std::size_t kMostPerCall = std::size_t{1} << 30;  // one call moves less than 2 GiB

int flags_of(File::Mode mode) {
  switch (mode) {
    case File::Mode::kRead: return O_RDONLY;
    case File::Mode::kWrite: return O_RDWR;
    case File::Mode::kCreate: return O_RDWR | O_CREAT | O_EXCL;
  }
  return O_RDONLY;
}

/// Fills `to` as far as the file goes; -1 with errno set on an error.
std::int64_t read_some(int fd, std::int64_t offset, std::span<std::byte> to, bool direct) {
  std::size_t done = 0;
  while (done < to.size()) {
    const ssize_t count = ::pread(fd, to.data() + done, std::min(to.size() - done, kMostPerCall),
                                  offset + static_cast<off_t>(done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return -1;
    done += static_cast<std::size_t>(count);
    // The end; past the page cache, one within a page, from where a read could not go on.
    if (count == 0 || (direct && count % 4096 != 0)) break;
  }
  return static_cast<std::int64_t>(done);
}

}  // namespace

File::File(std::string path, Mode mode)
    // O_NONBLOCK: opening a pipe must not wait for its writer, only to be refused below.
    : path_(std::move(path)),
      fd_(::open(path_.c_str(), flags_of(mode) | O_CLOEXEC | O_NONBLOCK, 0666)) {
  if (fd_ < 0) throw IoError(mode == Mode::kCreate ? "create" : "open", path_, errno);
  struct stat status {};
  if (::fstat(fd_, &status) == 0 && S_ISREG(status.st_mode)) return;
  ::close(fd_);
  throw InvalidArgument(path_, "expected a regular file, got a directory, pipe or device");
}

File::~File() {
  ::close(fd_);
  if (direct_fd_ >= 0) ::close(direct_fd_);
}

std::int64_t File::size() const {
  struct stat status {};
  if (::fstat(fd_, &status) != 0) throw IoError("inspect", path_, errno);
  return status.st_size;
}

std::int64_t File::read(std::int64_t offset, std::span<std::byte> to) const {
  const std::int64_t count = read_some(fd_, offset, to, false);
  if (count < 0) throw IoError("read", path_, errno);
  return count;
}

std::int64_t File::read_direct(std::int64_t offset, std::span<std::byte> to) const {
  std::call_once(direct_once_, [this] {
    // By its descriptor, as the path may be another file's by now.
    direct_fd_ = ::open(fmt::format("/proc/self/fd/{}", fd_).c_str(),
                        O_RDONLY | O_CLOEXEC | O_DIRECT | O_NONBLOCK);
  });
  const std::int64_t count = direct_fd_ < 0 ? -1 : read_some(direct_fd_, offset, to, true);
  if (count >= 0) return count;
  if (direct_fd_ >= 0 && errno != EINVAL) throw IoError("read", path_, errno);
  return read(offset, to);
}

bool File::is_cached(std::int64_t offset) const {
  std::byte byte{};
  const iovec to{&byte, 1};
  return ::preadv2(fd_, &to, 1, offset, RWF_NOWAIT) == 1;
}

void File::write(std::int64_t offset, std::span<const std::byte> from) {
  while (!from.empty()) {
    const ssize_t count = ::pwrite(fd_, from.data(), std::min(from.size(), kMostPerCall), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw IoError("write", path_, errno);
    from = from.subspan(static_cast<std::size_t>(count));
    offset += count;
  }
}

void File::resize(std::int64_t size) {
  while (::ftruncate(fd_, size) != 0) {
    if (errno != EINTR) throw IoError(fmt::format("resize to {} bytes", size), path_, errno);
  }
}

void File::sync() {
  if (::fdatasync(fd_) != 0) throw IoError("write to disk", path_, errno);
}

void File::check_reaches(std::int64_t expected) const {
  const std::int64_t got = size();
  if (got >= expected) return;
  throw IoError(
      fmt::format("{}: expected at least {} bytes, as it had before, got {}: it was "
                  "truncated while in use",
                  path_, expected, got));
}

}  // namespace keyfold::store

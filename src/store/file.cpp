#include "store/file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
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

File::~File() { ::close(fd_); }

std::int64_t File::size() const {
  struct stat status {};
  if (::fstat(fd_, &status) != 0) throw IoError("inspect", path_, errno);
  return status.st_size;
}

std::int64_t File::read(std::int64_t offset, std::span<std::byte> to) const {
  std::size_t done = 0;
  while (done < to.size()) {
    const ssize_t count = ::pread(fd_, to.data() + done, std::min(to.size() - done, kMostPerCall),
                                  offset + static_cast<off_t>(done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw IoError("read", path_, errno);
    if (count == 0) break;
    done += static_cast<std::size_t>(count);
  }
  return static_cast<std::int64_t>(done);
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

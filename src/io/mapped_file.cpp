// Mapping of input files.
#include "io/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "keyfold/io_error.hpp"

namespace keyfold::io {
namespace {

struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // O_NONBLOCK: opening a pipe must not wait for its writer, only to be refused below.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw IoError("open", path, errno);
  const Descriptor file{fd};

  struct stat status {};
  if (::fstat(file.fd, &status) != 0) throw IoError("inspect", path, errno);
  if (!S_ISREG(status.st_mode)) {
    throw InvalidArgument(path,
                          "expected a regular file, which can be mapped; got a directory, "
                          "pipe or device");
  }
  const auto size = static_cast<std::size_t>(status.st_size);
  if (size == 0) return;

  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (address == MAP_FAILED) throw IoError("map", path, errno);
  // Keys are read front to back; a hint only, so its failure does not matter.
  ::madvise(address, size, MADV_SEQUENTIAL);
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace keyfold::io

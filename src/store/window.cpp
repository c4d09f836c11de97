#include "store/window.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "keyfold/io_error.hpp"

namespace keyfold::store {
namespace {

constexpr std::int64_t kMostParts = 4096;  // of the 65530 mappings that a process may have
constexpr std::size_t kLen = 2;            // the axis of keys

std::int64_t page_size() {
  static const std::int64_t size = ::sysconf(_SC_PAGESIZE);
  return size;
}
std::int64_t page_down(std::int64_t offset) { return offset / page_size() * page_size(); }
std::int64_t page_up(std::int64_t offset) { return page_down(offset + page_size() - 1); }

}  // namespace

/// Keys that follow each other in the file are one part; axes with larger strides count the parts.
/// The parts lie in memory as they do in the file, but closer. Each keeps its place in its page, so
/// distances in memory and in the file differ by whole pages.
struct Window::Plan {
  std::vector<std::size_t> outer;          // axes that count the parts, inner ones first
  std::array<std::int64_t, 4> distance{};  // between parts in memory, bytes, of each outer axis
  std::int64_t first = 0;                  // byte in the file where the first part begins
  std::int64_t bytes = 0;                  // of a part
  std::int64_t span = 0;  // of all parts in memory, from the first page's beginning

  Plan(const FileTensor& t, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = size_of(t.dtype);
    const bool all = begin == 0 && end == t.sizes[kLen];
    std::int64_t parts = 1;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      if (axis == kLen || t.sizes[axis] == 1 || t.strides[axis] < t.strides[kLen]) continue;
      outer.push_back(axis);
      parts *= t.sizes[axis];
    }
    if (all || parts > kMostParts) outer.clear();  // one mapping, from the first byte to the last
    std::sort(outer.begin(), outer.end(),
              [&](std::size_t a, std::size_t b) { return t.strides[a] < t.strides[b]; });
    std::int64_t last = (end - begin - 1) * t.strides[kLen];
    for (std::size_t axis = 0; axis < 4; ++axis) {
      if (axis == kLen || is_outer(axis)) continue;
      last += (t.sizes[axis] - 1) * t.strides[axis];
    }
    first = t.begin + begin * t.strides[kLen] * size;
    bytes = (last + 1) * size;
    span = page_up(first % page_size() + bytes);
    for (const std::size_t axis : outer) {
      const std::int64_t in_file = t.strides[axis] * size;
      const std::int64_t apart = page_up(span) + page_size();
      distance[axis] = apart + (in_file - apart % page_size() + page_size()) % page_size();
      span = page_up(span + (t.sizes[axis] - 1) * distance[axis] + page_size());
    }
  }
  bool is_outer(std::size_t axis) const {
    return std::find(outer.begin(), outer.end(), axis) != outer.end();
  }
};

Window::Window(const FileTensor& tensor, std::int64_t begin, std::int64_t end)
    : file_(tensor.file) {
  const Plan plan(tensor, begin, end);
  file_end_ = plan.first + plan.bytes;
  for (const std::size_t axis : plan.outer) {
    file_end_ += (tensor.sizes[axis] - 1) * tensor.strides[axis] * size_of(tensor.dtype);
  }
  file_->check_reaches(file_end_);

  const auto reserve = static_cast<std::size_t>(plan.span);
  void* const address =
      ::mmap(nullptr, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) throw IoError("map", file_->path(), errno);
  reserved_ = {static_cast<std::byte*>(address), reserve};
  guard_ = std::make_unique<BusGuard>(address, reserve);

  std::byte* const data = reserved_.data() + plan.first % page_size();
  view_ = TensorView(data, tensor.dtype, tensor.sizes, tensor.strides);
  view_.sizes[kLen] = end - begin;
  for (const std::size_t axis : plan.outer) {
    view_.strides[axis] = plan.distance[axis] / size_of(tensor.dtype);
  }

  Dims index{};
  for (;;) {
    std::int64_t in_file = plan.first, in_memory = 0;
    for (const std::size_t axis : plan.outer) {
      in_file += index[axis] * tensor.strides[axis] * size_of(tensor.dtype);
      in_memory += index[axis] * plan.distance[axis];
    }
    std::byte* const to = data + in_memory - in_file % page_size();
    const auto bytes = static_cast<std::size_t>(page_up(in_file % page_size() + plan.bytes));
    if (::mmap(to, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, file_->descriptor(),
               page_down(in_file)) == MAP_FAILED) {
      const int error = errno;
      ::munmap(reserved_.data(), reserved_.size());
      throw IoError("map", file_->path(), error);
    }
    parts_.emplace_back(to, bytes);
    std::size_t i = 0;
    for (; i < plan.outer.size(); ++i) {
      const std::size_t axis = plan.outer[i];
      if (++index[axis] < tensor.sizes[axis]) break;
      index[axis] = 0;
    }
    if (i == plan.outer.size()) break;
  }
}

Window::~Window() { ::munmap(reserved_.data(), reserved_.size()); }

void Window::check() const {
  if (!guard_->lost()) return;
  file_->check_reaches(file_end_);
  throw IoError(file_->path() +
                ": expected its data to stay as it was while in use; got pages that could not be "
                "read, as it was truncated or the disk failed");
}

}  // namespace keyfold::store

// Where the pages of some keys go, and how they come there.
#include "store/window.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>

#include "keyfold/io_error.hpp"

namespace keyfold::store {
namespace {

constexpr std::int64_t kMostParts = 4096;  // of the 65530 mappings that a process may have
constexpr std::size_t kLen = 2;            // the axis of keys
constexpr std::size_t kBetweenSamples = std::size_t{1} << 20;  // bytes; one sample takes about 1 us
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers lack

/// Reads the pages in and enters them into the page table. A failure does not matter here: who
/// reads the pages meets it again.
void populate(std::span<std::byte> pages) {
  while (::madvise(pages.data(), pages.size(), kPopulateRead) != 0) {
    if (errno == EINTR) continue;
    if (errno == EINVAL) ::madvise(pages.data(), pages.size(), MADV_WILLNEED);
    return;
  }
}

std::int64_t page_size() {
  static const std::int64_t size = ::sysconf(_SC_PAGESIZE);
  return size;
}
std::int64_t page_down(std::int64_t offset) { return offset / page_size() * page_size(); }
std::int64_t page_up(std::int64_t offset) { return page_down(offset + page_size() - 1); }

}  // namespace

/// A part: whole pages of the file, and their distance from the memory's beginning.
struct Window::Place {
  std::int64_t in_file = 0, in_memory = 0;
  std::size_t bytes = 0;
};

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
  std::vector<Place> places(const FileTensor& t) const {
    std::vector<Place> found;
    Dims index{};
    for (;;) {
      std::int64_t in_file = first, in_memory = first % page_size();
      for (const std::size_t axis : outer) {
        in_file += index[axis] * t.strides[axis] * size_of(t.dtype);
        in_memory += index[axis] * distance[axis];
      }
      found.push_back({page_down(in_file), page_down(in_memory),
                       static_cast<std::size_t>(page_up(in_file % page_size() + bytes))});
      std::size_t i = 0;
      for (; i < outer.size(); ++i) {
        if (++index[outer[i]] < t.sizes[outer[i]]) break;
        index[outer[i]] = 0;
      }
      if (i == outer.size()) return found;
    }
  }
  bool is_outer(std::size_t axis) const {
    return std::find(outer.begin(), outer.end(), axis) != outer.end();
  }
};

Window::Window(const FileTensor& tensor, std::int64_t begin, std::int64_t end, BufferPool* pool)
    : file_(tensor.file) {
  const Plan plan(tensor, begin, end);
  file_end_ = plan.first + plan.bytes;
  for (const std::size_t axis : plan.outer) {
    file_end_ += (tensor.sizes[axis] - 1) * tensor.strides[axis] * size_of(tensor.dtype);
  }
  file_->check_reaches(file_end_);

  const std::vector<Window::Place> places = plan.places(tensor);
  const auto bytes = static_cast<std::size_t>(plan.span);
  cached_ = are_cached(places);
  if (pool != nullptr && !cached_) {
    pool_ = pool;
    memory_ = pool->take(bytes);
  } else {
    memory_ = map_pages(nullptr, bytes, PROT_NONE, -1, 0);
    guard_ = std::make_unique<BusGuard>(memory_.data(), bytes);
  }
  for (const Window::Place& place : places) {
    std::byte* const to = memory_.data() + place.in_memory;
    parts_.push_back({place.in_file, {to, place.bytes}});
    if (pool_ == nullptr) map_pages(to, place.bytes, PROT_READ, file_->descriptor(), place.in_file);
  }
  view_ = TensorView(memory_.data() + plan.first % page_size(), tensor.dtype, tensor.sizes,
                     tensor.strides);
  view_.sizes[kLen] = end - begin;
  for (const std::size_t axis : plan.outer) {
    view_.strides[axis] = plan.distance[axis] / size_of(tensor.dtype);
  }
}

Window::~Window() {
  guard_.reset();  // the addresses may be another's next
  drop();
}

void Window::drop() {
  if (memory_.empty()) return;
  if (pool_ != nullptr) {
    pool_->give(memory_);
  } else {
    ::munmap(memory_.data(), memory_.size());
  }
}

std::span<std::byte> Window::map_pages(std::byte* to, std::size_t bytes, int protection, int file,
                                       std::int64_t offset) {
  const int flags = file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED | MAP_FIXED;
  void* const address = ::mmap(to, bytes, protection, flags, file, offset);
  if (address != MAP_FAILED) return {static_cast<std::byte*>(address), bytes};
  const int error = errno;
  drop();
  throw IoError("map", file_->path(), error);
}

bool Window::are_cached(std::span<const Place> places) const {
  return std::all_of(places.begin(), places.end(), [&](const Window::Place& place) {
    for (std::size_t at = 0; at < place.bytes; at += kBetweenSamples) {
      if (!file_->is_cached(place.in_file + static_cast<std::int64_t>(at))) return false;
    }
    return true;
  });
}

void Window::load(const Part& part) const {
  if (pool_ == nullptr) return populate(part.pages);
  const std::int64_t count = file_->read_direct(part.offset, part.pages);
  // The last page may end behind the file.
  if (part.offset + count >=
      std::min(part.offset + static_cast<std::int64_t>(part.pages.size()), file_end_)) {
    return;
  }
  file_->check_reaches(file_end_);
  throw IoError(file_->path() + ": expected " + std::to_string(part.pages.size()) +
                " bytes at byte " + std::to_string(part.offset) + ", got " + std::to_string(count));
}

void Window::check() const {
  if (!guard_ || !guard_->lost()) return;
  file_->check_reaches(file_end_);
  throw IoError(file_->path() +
                ": expected its data to stay as it was while in use; got pages that could not be "
                "read, as it was truncated or the disk failed");
}

BufferPool::~BufferPool() {
  for (const std::span<std::byte> buffer : free_) ::munmap(buffer.data(), buffer.size());
}

std::span<std::byte> BufferPool::take(std::size_t bytes) {
  for (std::span<std::byte>& buffer : free_) {
    if (buffer.size() < bytes) continue;
    const std::span<std::byte> taken = buffer;
    buffer = free_.back();
    free_.pop_back();
    return taken;
  }
  for (const std::span<std::byte> buffer : free_) ::munmap(buffer.data(), buffer.size());
  free_.clear();  // too small, and so for all that will be asked for
  void* const address =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw std::bad_alloc();
  ::madvise(address, bytes, MADV_HUGEPAGE);
  return {static_cast<std::byte*>(address), bytes};
}

}  // namespace keyfold::store

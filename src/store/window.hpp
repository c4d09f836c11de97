// Keys of a tensor in a file, in memory as long as they are needed.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "keyfold/tensor.hpp"
#include "store/bus_guard.hpp"
#include "store/file.hpp"

namespace keyfold::store {

/// A tensor [batch, heads, len, dim] in a file, dense in any order of its axes.
struct FileTensor {
  std::shared_ptr<const File> file;
  std::int64_t begin = 0;         ///< byte of its first element, a multiple of the element size
  DType dtype = DType::kFloat32;  ///< element type
  Dims sizes{};                   ///< extents
  Dims strides{};                 ///< in elements
};

/// Memory that windows read into, kept for the next one: new pages would have to be cleared.
class BufferPool {
 public:
  BufferPool() = default;
  ~BufferPool();
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  /// At least so many bytes, from a page's beginning. Throws std::bad_alloc.
  std::span<std::byte> take(std::size_t bytes);
  void give(std::span<std::byte> buffer) { free_.push_back(buffer); }

 private:
  std::vector<std::span<std::byte>> free_;
};

/// Keys [begin, end) of a tensor, end > begin: only the pages that hold them, in as many parts as
/// they are apart in the file, so that a file may be larger than the address space that is allowed.
///
/// They are mapped; or, with a pool, where the page cache does not have them, read past it into
/// memory of the pool.
class Window {
 public:
  /// Throws IoError when the file no longer has these bytes, or they can't be mapped.
  Window(const FileTensor& tensor, std::int64_t begin, std::int64_t end,
         BufferPool* pool = nullptr);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// The keys, [batch, heads, end - begin, dim].
  const TensorView& view() const { return view_; }

  /// Whole pages of the file, and where they are in memory.
  struct Part {
    std::int64_t offset = 0;
    std::span<std::byte> pages;
  };
  /// What load() has to be called for before the view is used, or, where it is mapped, may be: from
  /// any threads, and in smaller parts.
  const std::vector<Part>& parts() const { return parts_; }
  bool is_mapped() const { return pool_ == nullptr; }
  /// Whether the page cache had all of it, as far as samples tell.
  bool is_cached() const { return cached_; }
  /// Brings some pages of a part into memory. Throws IoError.
  void load(const Part& pages) const;
  /// Throws IoError when something of what was read from the view was not in the file any more.
  void check() const;

 private:
  struct Place;
  struct Plan;
  bool are_cached(std::span<const Place> places) const;
  std::span<std::byte> map_pages(std::byte* to, std::size_t bytes, int protection, int file,
                                 std::int64_t offset);
  void drop();

  std::shared_ptr<const File> file_;
  std::int64_t file_end_ = 0;   // what the file has at least
  BufferPool* pool_ = nullptr;  // where the memory is from, unless it is mapped
  std::span<std::byte> memory_;
  bool cached_ = false;
  std::vector<Part> parts_;
  TensorView view_;
  std::unique_ptr<BusGuard> guard_;
};

}  // namespace keyfold::store

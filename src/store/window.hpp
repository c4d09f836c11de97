// Keys of a tensor in a file, mapped into memory as long as they are needed.
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

/// Maps keys [begin, end) of a tensor, end > begin: only these pages, in as many mappings as they
/// are apart in the file, so that a file may be larger than the address space that is allowed.
class Window {
 public:
  /// Throws IoError when the file no longer has these bytes, or they can't be mapped.
  Window(const FileTensor& tensor, std::int64_t begin, std::int64_t end);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// The keys, [batch, heads, end - begin, dim].
  const TensorView& view() const { return view_; }
  /// What is mapped, in whole pages.
  std::span<const std::span<std::byte>> parts() const { return parts_; }
  /// Throws IoError when something of what was read from the view was not in the file any more.
  void check() const;

 private:
  struct Plan;

  std::shared_ptr<const File> file_;
  std::int64_t file_end_ = 0;  // what the file has at least
  std::span<std::byte> reserved_;
  std::vector<std::span<std::byte>> parts_;
  TensorView view_;
  std::unique_ptr<BusGuard> guard_;
};

}  // namespace keyfold::store

// What a reader finds out about one tensor in a file: type, axes, and where its elements lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "keyfold/tensor.hpp"

namespace keyfold::io {

/// Most axes that a reader accepts; NumPy's limit was the same.
inline constexpr std::size_t kMaxRank = 32;

/// One tensor inside the bytes of a file; the bytes are not owned.
struct TensorLayout {
  DType dtype = DType::kFloat32;      ///< element type
  std::vector<std::int64_t> shape;    ///< extents, any rank
  std::vector<std::int64_t> strides;  ///< in elements, all positive
  std::span<const std::byte> data;    ///< the tensor's bytes, or none where only a head was given
  std::size_t begin = 0;              ///< where in the file they are
};

/// A file to be parsed: all of it, or its first bytes and its size.
struct FileHead {
  FileHead(std::span<const std::byte> whole) : FileHead(whole, whole.size()) {}
  FileHead(std::span<const std::byte> first_bytes, std::size_t file_size)
      : bytes(first_bytes), size(file_size) {}

  std::span<const std::byte> bytes;
  std::size_t size;
};

/// Order of the elements of a dense tensor.
enum class Order { kRowMajor, kColumnMajor };

/// Bytes of a dense tensor. Throws InvalidArgument, naming `source`, for a negative extent, or when
/// the extents, zeros left out, multiply to 2^63 bytes or more.
std::int64_t byte_size(const std::string& source, DType dtype, std::span<const std::int64_t> shape);

/// The layout of a dense tensor that fills bytes [begin, end) of `file`; the caller has checked
/// that they lie inside. Throws InvalidArgument, naming `source`, when the shape needs more or
/// fewer bytes, or when they are not aligned to the element size: elements are read in place, so
/// that a tensor may exceed memory, and are never copied.
TensorLayout make_layout(const std::string& source, DType dtype, std::vector<std::int64_t> shape,
                         Order order, const FileHead& file, std::size_t begin, std::size_t end);

/// Axes of an array [batch, heads, len, dim], where those that lack on the left count as 1: sizes
/// and strides. Throws InvalidArgument, naming `source`, unless there are two to four.
std::pair<Dims, Dims> attention_axes(const std::string& source, const TensorLayout& layout);

/// "[2, 3]"
std::string to_text(std::span<const std::int64_t> shape);

/// Text from a file, in quotes: cut to 80 bytes, with what a terminal might obey replaced by '?'.
std::string in_quotes(std::string_view text);

}  // namespace keyfold::io

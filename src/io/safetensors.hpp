// The safetensors format: a JSON header that says where each tensor lies, then the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "io/layout.hpp"

namespace keyfold::io {

/// Most bytes of a header; the limit of the format's reference implementation.
inline constexpr std::size_t kMaxSafetensorsHeader = 100'000'000;

/// Whether `file` begins like a safetensors file: a length, then '{'.
bool is_safetensors(std::span<const std::byte> file);

/// Bytes from the beginning to the end of the header, as the first 8 bytes or more say.
std::uint64_t safetensors_data_begin(std::span<const std::byte> head);

/// The header of one file, checked.
class SafetensorsIndex {
 public:
  /// Reads the header of a file, which is not owned. Throws InvalidArgument, naming
  /// `source`, when the header is not as the format asks: valid JSON, no name twice, and data
  /// that the tensors cover without hole or overlap. Takes time and memory proportional to the
  /// header; nothing in it is recursed into.
  SafetensorsIndex(std::string source, const FileHead& file);

  /// The tensor of this name; an empty name means the only tensor of the file. Throws
  /// InvalidArgument when there is none, or its element type, shape or alignment does not serve.
  TensorLayout find(const std::string& name) const;

  /// A tensor as the header describes it.
  struct Entry {
    std::string name;
    std::string dtype;                ///< the format's name, such as "F32"
    std::vector<std::int64_t> shape;  ///< extents
    std::size_t begin = 0, end = 0;   ///< its bytes in the file
  };
  /// All tensors, in the order of their data.
  const std::vector<Entry>& entries() const noexcept { return entries_; }

 private:
  std::string names() const;

  std::string source_;
  FileHead file_;
  std::vector<Entry> entries_;
};

/// A tensor to be written.
struct NamedShape {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
};

/// What precedes the data of these tensors, laid out one behind the other. Its size is a multiple
/// of 8: tensors in descending order of element size are all aligned. Throws InvalidArgument,
/// naming `source`, for a name that is empty, reserved, not UTF-8 or there twice.
std::string safetensors_header(const std::string& source, std::span<const NamedShape> tensors);

}  // namespace keyfold::io

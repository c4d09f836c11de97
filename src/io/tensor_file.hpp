// Input tensors: opens a .npy or .safetensors file and views it in place.
#pragma once

#include <memory>
#include <string>

#include "io/layout.hpp"
#include "io/mapped_file.hpp"
#include "keyfold/tensor.hpp"

namespace keyfold::io {

/// "file.safetensors:tensor" taken apart.
struct PathSpec {
  std::string path;
  std::string tensor;  ///< empty when none is named
};

/// Splits behind the first ".safetensors:"; any other text is a path alone, colons included.
PathSpec parse_path_spec(const std::string& spec);

/// The tensor that `spec` names in this file, whose contents decide the format. Of a head, the
/// whole header is needed. Throws InvalidArgument when it is malformed.
TensorLayout parse_tensor(const std::string& spec, const FileHead& file);

/// A tensor in a mapped file. Copies share the mapping.
struct LoadedTensor {
  std::string source;                      ///< the path, and the tensor's name where it was given
  TensorLayout layout;                     ///< points into `file`
  std::shared_ptr<const MappedFile> file;  ///< keeps the mapping

  /// The tensor as [batch, heads, len, dim], valid while a copy of this LoadedTensor lives: four
  /// axes as they are; three are [heads, len, dim]; two are [len, dim]. Throws InvalidArgument for
  /// any other number of axes.
  TensorView view() const;
};

/// Opens `spec`, PATH[:TENSOR]; the contents decide the format. Maps the file, reads its header and
/// no data. Throws IoError when the file cannot be mapped, InvalidArgument when it is malformed.
LoadedTensor open_tensor(const std::string& spec);

}  // namespace keyfold::io

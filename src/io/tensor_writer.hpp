// Output tensors: writes .npy and .safetensors files, all of them or none.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "io/atomic_file.hpp"
#include "io/layout.hpp"

namespace keyfold::io {

/// One tensor to be written, dense and row-major.
struct OutputTensor {
  std::string spec;                 ///< PATH.npy, PATH.safetensors or PATH.safetensors:TENSOR
  std::string default_name;         ///< its name in a safetensors file when `spec` gives none
  DType dtype = DType::kFloat32;    ///< element type
  std::vector<std::int64_t> shape;  ///< extents, any rank
};

/// Writes a set of tensors. Several may go into one safetensors file. Nothing appears under the
/// final names before commit(), and nothing is left behind when it is not reached.
class TensorWriter {
 public:
  /// Checks the names, creates the temporary files and claims their disk space: what can fail does
  /// so here, before the work. Throws IoError or InvalidArgument, naming the file.
  explicit TensorWriter(std::vector<OutputTensor> tensors);

  /// Writes all files, then renames all. `data` holds each tensor's bytes, in the order given to
  /// the constructor. To be called once. Throws IoError; files renamed before a rename fails stay.
  void commit(std::span<const void* const> data);

 private:
  struct File {
    AtomicFile output;
    std::vector<std::size_t> tensors;  // indices, in the order of the data
  };
  void begin(File& file);

  std::vector<OutputTensor> tensors_;
  std::vector<File> files_;
};

}  // namespace keyfold::io

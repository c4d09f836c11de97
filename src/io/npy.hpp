// NumPy's .npy format, versions 1.0 to 3.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "io/layout.hpp"

namespace keyfold::io {

/// Whether `file` begins as every .npy file does.
bool is_npy(std::span<const std::byte> file);

/// Reads the header of a .npy file. Element types: '<f4', '<f2', '|b1', and for bfloat16 the
/// '<V2' that ml_dtypes writes (also '|V2' and 'bfloat16'). Fortran order becomes strides. Throws
/// InvalidArgument, naming `source`, for anything else, also when data is missing or left over.
TensorLayout parse_npy(const std::string& source, const FileHead& head);

/// What precedes the data of a dense row-major tensor; its size is a multiple of 64.
std::string npy_header(DType dtype, std::span<const std::int64_t> shape);

}  // namespace keyfold::io

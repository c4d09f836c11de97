// Finds the reader for an input file.
#include "io/tensor_file.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>

#include "io/npy.hpp"
#include "io/safetensors.hpp"
#include "keyfold/error.hpp"

namespace keyfold::io {

PathSpec parse_path_spec(const std::string& spec) {
  constexpr std::string_view kSeparator = ".safetensors:";
  const std::size_t at = spec.find(kSeparator);
  if (at == std::string::npos) return {spec, ""};
  const std::size_t colon = at + kSeparator.size() - 1;
  if (colon + 1 == spec.size()) {
    throw InvalidArgument(spec, "expected the name of a tensor after ':', got nothing");
  }
  return {spec.substr(0, colon), spec.substr(colon + 1)};
}

TensorView LoadedTensor::view() const {
  const std::size_t rank = layout.shape.size();
  Dims sizes{1, 1, 1, 1};
  if (rank < 2 || rank > sizes.size()) {
    throw InvalidArgument(source,
                          fmt::format("expected axes [batch, heads, len, dim], [heads, len, "
                                      "dim] or [len, dim]; got {} axes, {}",
                                      rank, to_text(layout.shape)));
  }
  // An axis that is not there has one entry, so its stride is never stepped over.
  const auto bytes = static_cast<std::int64_t>(layout.data.size());
  const std::int64_t elements = bytes / size_of(layout.dtype);
  Dims strides;
  strides.fill(std::max<std::int64_t>(elements, 1));
  std::copy_backward(layout.shape.begin(), layout.shape.end(), sizes.end());
  std::copy_backward(layout.strides.begin(), layout.strides.end(), strides.end());
  return {layout.data.data(), layout.dtype, sizes, strides};
}

LoadedTensor open_tensor(const std::string& spec) {
  const PathSpec parts = parse_path_spec(spec);
  auto file = std::make_shared<const MappedFile>(parts.path);
  const auto bytes = file->bytes();
  if (is_npy(bytes) && parts.tensor.empty()) return {spec, parse_npy(spec, bytes), std::move(file)};
  if (is_safetensors(bytes)) {
    const SafetensorsIndex index(parts.path, bytes);
    return {spec, index.find(parts.tensor), std::move(file)};
  }
  throw InvalidArgument(spec,
                        fmt::format("expected a file as numpy.save or safetensors write it, got {}",
                                    bytes.empty() ? "an empty file" : "other contents"));
}

}  // namespace keyfold::io

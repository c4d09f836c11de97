// Finds the reader for an input file.
#include "io/tensor_file.hpp"

#include <fmt/format.h>

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
  const auto [sizes, strides] = attention_axes(source, layout);
  return {layout.data.data(), layout.dtype, sizes, strides};
}

TensorLayout parse_tensor(const std::string& spec, const FileHead& file) {
  const PathSpec parts = parse_path_spec(spec);
  if (is_npy(file.bytes) && parts.tensor.empty()) return parse_npy(spec, file);
  if (is_safetensors(file.bytes)) return SafetensorsIndex(parts.path, file).find(parts.tensor);
  throw InvalidArgument(spec,
                        fmt::format("expected a file as numpy.save or safetensors write it, got {}",
                                    file.bytes.empty() ? "an empty file" : "other contents"));
}

LoadedTensor open_tensor(const std::string& spec) {
  auto file = std::make_shared<const MappedFile>(parse_path_spec(spec).path);
  TensorLayout layout = parse_tensor(spec, file->bytes());
  return {spec, std::move(layout), std::move(file)};
}

}  // namespace keyfold::io

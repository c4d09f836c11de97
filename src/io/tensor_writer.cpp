// Groups output tensors into files and writes them.
#include "io/tensor_writer.hpp"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <utility>

#include "io/npy.hpp"
#include "io/safetensors.hpp"
#include "io/tensor_file.hpp"
#include "keyfold/error.hpp"

namespace keyfold::io {

TensorWriter::TensorWriter(std::vector<OutputTensor> tensors) : tensors_(std::move(tensors)) {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const std::filesystem::path path = parse_path_spec(tensors_[i].spec).path;
    if (path.extension() != ".npy" && path.extension() != ".safetensors") {
      throw InvalidArgument(tensors_[i].spec, "expected a name that ends in .npy or .safetensors");
    }
    AtomicFile output(path);
    const auto same = std::find_if(files_.begin(), files_.end(), [&](const File& file) {
      return file.output.target() == output.target();
    });
    if (same == files_.end()) {
      files_.push_back({std::move(output), {i}});
    } else {
      same->tensors.push_back(i);
    }
  }
  for (File& file : files_) begin(file);
}

void TensorWriter::begin(File& file) {
  // Larger elements first keeps all of them aligned.
  std::stable_sort(file.tensors.begin(), file.tensors.end(), [&](std::size_t a, std::size_t b) {
    return size_of(tensors_[a].dtype) > size_of(tensors_[b].dtype);
  });
  std::vector<NamedShape> shapes;
  for (const std::size_t i : file.tensors) {
    const OutputTensor& tensor = tensors_[i];
    const std::string name = parse_path_spec(tensor.spec).tensor;
    shapes.push_back({name.empty() ? tensor.default_name : name, tensor.dtype, tensor.shape});
  }

  const std::string target = file.output.target().string();
  const bool npy = file.output.target().extension() == ".npy";
  if (npy && shapes.size() > 1) {
    throw InvalidArgument(target, "expected one tensor for a .npy file, got several");
  }
  const std::string header =
      npy ? npy_header(shapes[0].dtype, shapes[0].shape) : safetensors_header(target, shapes);
  auto bytes = static_cast<std::uint64_t>(header.size());
  for (const NamedShape& tensor : shapes) {
    bytes += static_cast<std::uint64_t>(byte_size(target, tensor.dtype, tensor.shape));
  }
  file.output.reserve(static_cast<std::int64_t>(bytes));
  file.output.write(std::as_bytes(std::span(header)));
}

void TensorWriter::commit(std::span<const void* const> data) {
  for (File& file : files_) {
    for (const std::size_t i : file.tensors) {
      const std::int64_t bytes = byte_size(tensors_[i].spec, tensors_[i].dtype, tensors_[i].shape);
      file.output.write({static_cast<const std::byte*>(data[i]), static_cast<std::size_t>(bytes)});
    }
    file.output.finish();
  }
  for (File& file : files_) file.output.publish();
}

}  // namespace keyfold::io

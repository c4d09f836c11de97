// open_source(): headers of .npy and .safetensors files, and their tensors as one extent.
#include "keyfold/file_source.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "io/safetensors.hpp"
#include "io/tensor_file.hpp"
#include "store/windowed_source.hpp"

namespace keyfold {
namespace store {
namespace {

constexpr std::size_t kHeadBytes = 1 << 20;  // more than any .npy header that NumPy writes

FileTensor open_tensor(const std::string& spec, Axes axes) {
  FileTensor tensor;
  tensor.file = std::make_shared<const File>(io::parse_path_spec(spec).path);
  const auto size = static_cast<std::size_t>(tensor.file->size());
  std::vector<std::byte> head(std::min(size, kHeadBytes));
  const auto read_head = [&] { head.resize(static_cast<std::size_t>(tensor.file->read(0, head))); };
  read_head();
  if (io::is_safetensors(head)) {
    const std::uint64_t needed = io::safetensors_data_begin(head);
    if (needed > head.size() && needed <= std::min(size, io::kMaxSafetensorsHeader)) {
      head.resize(needed);
      read_head();
    }
  }
  const io::TensorLayout layout = io::parse_tensor(spec, {head, size});
  tensor.begin = static_cast<std::int64_t>(layout.begin);
  tensor.dtype = layout.dtype;
  std::tie(tensor.sizes, tensor.strides) = io::attention_axes(spec, layout);
  if (axes == Axes::kBLHD && layout.shape.size() >= 3) {
    std::swap(tensor.sizes[1], tensor.sizes[2]);
    std::swap(tensor.strides[1], tensor.strides[2]);
  }
  return tensor;
}

class FileSource final : public WindowedSource {
 public:
  FileSource(FileTensor k, FileTensor v, const SourceOptions& options)
      : WindowedSource({k.sizes[0], k.sizes[1], k.sizes[3], v.sizes[3], k.dtype}, options),
        all_{std::move(k), std::move(v), 0, 0} {
    all_.end = all_.k.sizes[2];
  }

  std::int64_t size() const override { return all_.end; }

 protected:
  std::optional<Extent> extent(std::int64_t key, bool) override {
    return key < all_.end ? std::optional(all_) : std::nullopt;
  }

 private:
  Extent all_;
};

}  // namespace
}  // namespace store

std::unique_ptr<KeyValueSource> open_source(const std::string& k, const std::string& v, Axes axes,
                                            const SourceOptions& options) {
  store::check_options(options);
  store::FileTensor keys = store::open_tensor(k, axes), values = store::open_tensor(v, axes);
  if (keys.dtype == DType::kBool) {
    throw InvalidArgument(k, "expected float32, float16 or bfloat16, got bool");
  }
  if (values.dtype != keys.dtype) {
    throw InvalidArgument(v, fmt::format("expected {}, as the keys are, got {}",
                                         name_of(keys.dtype), name_of(values.dtype)));
  }
  const auto& [batch, heads, len, head_dim] = keys.sizes;
  if (std::min({batch, heads, head_dim, values.sizes[3]}) < 1 || values.sizes[0] != batch ||
      values.sizes[1] != heads || values.sizes[2] != len) {
    throw InvalidArgument(
        v, fmt::format("expected values [{}, {}, {}, value_dim], as many as the keys of {}, and no "
                       "axis but len of 0; got [{}]",
                       batch, heads, len, k, fmt::join(values.sizes, ", ")));
  }
  return std::make_unique<store::FileSource>(std::move(keys), std::move(values), options);
}

}  // namespace keyfold

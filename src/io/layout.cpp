// The checks that both file formats share.
#include "io/layout.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>

#include "keyfold/error.hpp"

namespace keyfold::io {

static_assert(std::endian::native == std::endian::little, "both formats are little-endian");

std::int64_t byte_size(const std::string& source, DType dtype,
                       std::span<const std::int64_t> shape) {
  std::int64_t bytes = size_of(dtype);
  for (const std::int64_t extent : shape) {
    // Zeros are left out so that the strides fit in 64 bits as well.
    if (extent < 0 || __builtin_mul_overflow(bytes, std::max<std::int64_t>(extent, 1), &bytes)) {
      throw InvalidArgument(source, fmt::format("expected extents of at least 0 and less than "
                                                "2^63 bytes in all, got {} of {}",
                                                to_text(shape), name_of(dtype)));
    }
  }
  return std::find(shape.begin(), shape.end(), 0) == shape.end() ? bytes : 0;
}

TensorLayout make_layout(const std::string& source, DType dtype, std::vector<std::int64_t> shape,
                         Order order, const FileHead& file, std::size_t begin, std::size_t end) {
  const std::int64_t expected = byte_size(source, dtype, shape);
  if (static_cast<std::uint64_t>(expected) != end - begin) {
    throw InvalidArgument(
        source, fmt::format("expected {} bytes of data for shape {} of {}, got {}", expected,
                            to_text(shape), name_of(dtype), end - begin));
  }
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(file.bytes.data()) + begin;
  if (address % static_cast<std::uintptr_t>(size_of(dtype))) {
    throw InvalidArgument(
        source, fmt::format("expected its data at a multiple of {} bytes, where {} can be read in "
                            "place; got file offset {}; NumPy and safetensors 0.3 or newer align "
                            "what they save, so save it again with one of them",
                            size_of(dtype), name_of(dtype), begin));
  }

  TensorLayout layout{dtype, std::move(shape), {}, {}, begin};
  if (end <= file.bytes.size()) layout.data = file.bytes.subspan(begin, end - begin);
  layout.strides.resize(layout.shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = 0; i < layout.shape.size(); ++i) {
    const std::size_t axis = order == Order::kColumnMajor ? i : layout.shape.size() - 1 - i;
    layout.strides[axis] = stride;
    stride *= std::max<std::int64_t>(layout.shape[axis], 1);
  }
  return layout;
}

std::pair<Dims, Dims> attention_axes(const std::string& source, const TensorLayout& layout) {
  const std::size_t rank = layout.shape.size();
  Dims sizes{1, 1, 1, 1};
  if (rank < 2 || rank > sizes.size()) {
    throw InvalidArgument(source,
                          fmt::format("expected axes [batch, heads, len, dim], [heads, len, "
                                      "dim] or [len, dim]; got {} axes, {}",
                                      rank, to_text(layout.shape)));
  }
  // An axis that is not there has one entry, so its stride is never stepped over.
  Dims strides;
  strides.fill(std::max<std::int64_t>(
      byte_size(source, layout.dtype, layout.shape) / size_of(layout.dtype), 1));
  std::copy_backward(layout.shape.begin(), layout.shape.end(), sizes.end());
  std::copy_backward(layout.strides.begin(), layout.strides.end(), strides.end());
  return {sizes, strides};
}

std::string to_text(std::span<const std::int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kLongest = 80;
  std::string result = "'";
  for (const char c : text.substr(0, kLongest)) {
    result += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return result + (text.size() > kLongest ? "...'" : "'");
}

}  // namespace keyfold::io

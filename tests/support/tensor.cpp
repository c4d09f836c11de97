// A tensor that owns its memory, in any layout, with garbage or poison wherever no element is.
#include "support/tensor.hpp"

#include <cstring>

#include "core/half.hpp"

namespace keyfold::test {
namespace {
constexpr std::int64_t kMargin = 64;  // elements of garbage before and behind
constexpr std::uint32_t kPoison32 = 0x7fc5a5a5u;
constexpr std::uint16_t kPoisonHalf = 0x7ea5u;
constexpr std::uint16_t kPoisonBFloat = 0x7fe5u;
constexpr std::uint8_t kPoisonBool = 0xa5u;

void put(std::byte* to, DType dtype, float value) {
  if (dtype == DType::kBool) {
    *to = std::byte{value != 0};
  } else {
    core::store_float(to, dtype, value);
  }
}

/// The bits of the poison of a dtype, as bytes.
const void* poison_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kPoison32;
    case DType::kFloat16: return &kPoisonHalf;
    case DType::kBFloat16: return &kPoisonBFloat;
    case DType::kBool: return &kPoisonBool;
  }
  return nullptr;
}
}  // namespace

std::string_view name_of(Layout layout) {
  switch (layout) {
    case Layout::kDense: return "dense";
    case Layout::kTransposed: return "transposed";
    case Layout::kSliced: return "sliced";
    case Layout::kStridedDim: return "strided_dim";
    case Layout::kRepeatHeads: return "repeat_heads";
    case Layout::kRepeatKeys: return "repeat_keys";
  }
  return "unknown";
}

float rounded(float value, DType dtype) {
  float result = 0;
  core::store_float(&result, dtype, value);
  return core::load_float(&result, dtype);
}

float load(const TensorView& t, const Dims& i) {
  const std::byte* from = core::element(t, i[0], i[1], i[2], i[3]);
  if (t.dtype == DType::kBool) return *from != std::byte{0} ? 1.0f : 0.0f;
  return core::load_float(from, t.dtype);
}

Tensor::Tensor(DType dtype, const Dims& sizes, Layout layout)
    : dtype_(dtype), sizes_(sizes), begin_(kMargin) {
  Dims outer = sizes;
  switch (layout) {
    case Layout::kSliced: outer = {sizes[0] + 1, sizes[1] + 2, sizes[2] + 3, sizes[3] + 5}; break;
    case Layout::kStridedDim: outer[3] = 2 * sizes[3]; break;
    case Layout::kRepeatHeads: outer[1] = 1; break;
    case Layout::kRepeatKeys: outer[2] = 1; break;
    case Layout::kDense:
    case Layout::kTransposed: break;
  }
  strides_ = dense_strides(outer);
  switch (layout) {
    case Layout::kTransposed:
      strides_ = {sizes[1] * sizes[2] * sizes[3], sizes[3], sizes[1] * sizes[3], 1};
      break;
    case Layout::kSliced: begin_ += strides_[1] + strides_[2] + 2; break;
    case Layout::kStridedDim: strides_[3] = 2; break;
    case Layout::kRepeatHeads: strides_[1] = 0; break;
    case Layout::kRepeatKeys: strides_[2] = 0; break;
    case Layout::kDense: break;
  }
  const std::int64_t elements = begin_ + outer[0] * outer[1] * outer[2] * outer[3] + kMargin;
  memory_.resize(static_cast<std::size_t>(elements * size_of(dtype)));
  for (std::int64_t i = 0; i < elements; ++i)
    put(memory_.data() + i * size_of(dtype), dtype,
        i % 3 == 0   ? kNaN
        : i % 3 == 1 ? 60000.0f
                     : -60000.0f);
}

void Tensor::set(const Dims& i, float value) {
  put(data() + offset(i) * size_of(dtype_), dtype_, value);
}

void Tensor::each(const std::function<void(const Dims&)>& visit) const {
  Dims i{};
  for (i[0] = 0; i[0] < sizes_[0]; ++i[0])
    for (i[1] = 0; i[1] < sizes_[1]; ++i[1])
      for (i[2] = 0; i[2] < sizes_[2]; ++i[2])
        for (i[3] = 0; i[3] < sizes_[3]; ++i[3]) visit(i);
}

void Tensor::fill(const std::function<float()>& value) {
  each([&](const Dims& i) { set(i, value()); });
}

void Tensor::poison() {
  const auto size = static_cast<std::size_t>(size_of(dtype_));
  for (std::size_t i = 0; i < memory_.size(); i += size)
    std::memcpy(&memory_[i], poison_of(dtype_), size);
}

bool Tensor::poisoned_at(std::int64_t element) const {
  return std::memcmp(memory_.data() + element * size_of(dtype_), poison_of(dtype_),
                     static_cast<std::size_t>(size_of(dtype_))) == 0;
}

bool Tensor::poisoned(const Dims& i) const { return poisoned_at(begin_ + offset(i)); }

bool Tensor::untouched() const {
  for (std::int64_t i = 0; i < capacity(); ++i)
    if (!poisoned_at(i)) return false;
  return true;
}

bool Tensor::only_elements_written() const {
  std::int64_t written = 0;
  for (std::int64_t i = 0; i < capacity(); ++i) written += poisoned_at(i) ? 0 : 1;
  each([&](const Dims& i) { written -= poisoned(i) ? 0 : 1; });
  return written == 0;
}

std::vector<std::byte> Tensor::bytes() const {
  std::vector<std::byte> result(static_cast<std::size_t>(count() * size_of(dtype_)));
  std::byte* to = result.data();
  each([&](const Dims& i) {
    std::memcpy(to, data() + offset(i) * size_of(dtype_),
                static_cast<std::size_t>(size_of(dtype_)));
    to += size_of(dtype_);
  });
  return result;
}

}  // namespace keyfold::test

#include "induction.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "core/half.hpp"
#include "mix.hpp"

namespace keyfold::cli {
namespace {

std::uint32_t bits_of(DType dtype, float value) {
  switch (dtype) {
    case DType::kFloat16: return core::float_to_float16(value);
    case DType::kBFloat16: return core::float_to_bfloat16(value);
    default: return std::bit_cast<std::uint32_t>(value);
  }
}

/// Writes `count` elements whose signs follow from `state`; `positive` is the element without one.
template <class Bits>
void write_signs(std::byte* to, std::int64_t count, std::uint64_t state, std::uint32_t positive) {
  constexpr int kSignShift = 8 * sizeof(Bits) - 1;
  auto* elements = reinterpret_cast<Bits*>(to);
  std::uint64_t word = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i % 64 == 0) word = state = mix(state);
    elements[i] = static_cast<Bits>(positive | ((word & 1) << kSignShift));
    word >>= 1;
  }
}

/// The same, of +magnitude and -magnitude in a dtype.
void write_signs(DType dtype, std::byte* to, std::int64_t count, std::uint64_t state,
                 float magnitude) {
  if (dtype == DType::kFloat32)
    write_signs<std::uint32_t>(to, count, state, bits_of(dtype, magnitude));
  else
    write_signs<std::uint16_t>(to, count, state, bits_of(dtype, magnitude));
}

}  // namespace

std::int64_t InductionHeads::cache_bytes(const HeadShape& shape, std::int64_t capacity) {
  return 2 * shape.num_kv_heads * capacity * shape.head_dim * size_of(shape.dtype);
}

InductionHeads::InductionHeads(const HeadShape& shape, std::uint64_t seed, std::int64_t capacity,
                               std::string before)
    : shape_(shape),
      seed_(mix(seed)),
      capacity_(capacity),
      text_(std::move(before)),
      first_(static_cast<std::int64_t>(text_.size())) {
  const auto bytes = static_cast<std::size_t>(cache_bytes(shape, capacity) / 2);
  keys_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
  values_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
  text_.reserve(static_cast<std::size_t>(first_ + capacity));
  value_codes_.resize(static_cast<std::size_t>(shape.num_kv_heads * 256 * row_bytes()));
  for (std::int64_t code = 0; code < shape.num_kv_heads * 256; ++code)
    write_signs(shape.dtype, value_codes_.data() + code * row_bytes(), shape.head_dim,
                mix(seed_ ^ static_cast<std::uint64_t>(code)), 1);
}

void InductionHeads::append(std::string_view bytes) {
  for (const char byte : bytes) {
    const auto position = static_cast<std::int64_t>(text_.size());
    const Suffixes before = suffixes(position);
    for (std::int64_t head = 0; head < shape_.num_kv_heads; ++head) {
      const std::int64_t row = (head * capacity_ + position - first_) * row_bytes();
      write_code(keys_.get() + row, before, head, kOrders.size());
      std::memcpy(values_.get() + row, value_code(head, byte),
                  static_cast<std::size_t>(row_bytes()));
    }
    text_.push_back(byte);
  }
}

TensorView InductionHeads::cache_view(const std::byte* data) const {
  const auto size = static_cast<std::int64_t>(text_.size()) - first_;
  return {data,
          shape_.dtype,
          {1, shape_.num_kv_heads, size, shape_.head_dim},
          dense_strides({1, shape_.num_kv_heads, capacity_, shape_.head_dim})};
}

TensorView InductionHeads::queries(std::int64_t count) {
  query_count_ = count;
  queries_.resize(static_cast<std::size_t>(shape_.num_heads * count * row_bytes()));
  output_.resize(queries_.size());
  const std::int64_t group = shape_.num_heads / shape_.num_kv_heads;
  const std::int64_t first = static_cast<std::int64_t>(text_.size()) - count;
  for (std::int64_t i = 0; i < count; ++i) {
    const Suffixes with_row = suffixes(first + i + 1);
    for (std::int64_t head = 0; head < shape_.num_heads; ++head)
      write_code(queries_.data() + (head * count + i) * row_bytes(), with_row, head / group,
                 kOrders.size() - 1 - static_cast<std::size_t>(head % group) % kOrders.size());
  }
  return {queries_.data(), shape_.dtype, {1, shape_.num_heads, count, shape_.head_dim}};
}

MutableTensorView InductionHeads::output() {
  return {output_.data(), shape_.dtype, {1, shape_.num_heads, query_count_, shape_.head_dim}};
}

char InductionHeads::next_byte() const {
  std::array<float, 256> similarity{};
  const std::int64_t size = size_of(shape_.dtype);
  const std::int64_t group = shape_.num_heads / shape_.num_kv_heads;
  for (std::int64_t head = 0; head < shape_.num_heads; ++head) {
    const std::byte* row = output_.data() + ((head + 1) * query_count_ - 1) * row_bytes();
    for (std::size_t byte = 0; byte < similarity.size(); ++byte) {
      const std::byte* code = value_code(head / group, static_cast<char>(byte));
      for (std::int64_t d = 0; d < shape_.head_dim * size; d += size)
        similarity[byte] +=
            core::load_float(row + d, shape_.dtype) * core::load_float(code + d, shape_.dtype);
    }
  }
  return static_cast<char>(std::max_element(similarity.begin(), similarity.end()) -
                           similarity.begin());
}

/// Hashes of the kOrders[i] bytes before `position` (or as many as there are).
InductionHeads::Suffixes InductionHeads::suffixes(std::int64_t position) const {
  Suffixes hashes;
  std::uint64_t hash = seed_;
  std::int64_t length = 0;
  for (std::size_t i = 0; i < kOrders.size(); ++i) {
    for (; length < kOrders[i] && length < position; ++length)
      hash = mix(hash ^ static_cast<unsigned char>(
                            text_[static_cast<std::size_t>(position - length - 1)]));
    hashes[i] = hash;
  }
  return hashes;
}

void InductionHeads::write_code(std::byte* row, const Suffixes& suffixes, std::int64_t kv_head,
                                std::size_t doubled_order) const {
  constexpr auto kSlices = static_cast<std::int64_t>(kOrders.size());
  for (std::size_t i = 0; i < kOrders.size(); ++i) {
    const std::int64_t begin = shape_.head_dim * static_cast<std::int64_t>(i) / kSlices;
    const std::int64_t end = shape_.head_dim * static_cast<std::int64_t>(i + 1) / kSlices;
    const std::uint64_t salt = static_cast<std::uint64_t>(kv_head) * kOrders.size() + i;
    write_signs(shape_.dtype, row + begin * size_of(shape_.dtype), end - begin,
                mix(suffixes[i] ^ mix(salt)), i == doubled_order ? 2 : 1);
  }
}

const std::byte* InductionHeads::value_code(std::int64_t kv_head, char byte) const {
  return value_codes_.data() + (kv_head * 256 + static_cast<unsigned char>(byte)) * row_bytes();
}

}  // namespace keyfold::cli

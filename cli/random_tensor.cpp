#include "random_tensor.hpp"

#include <algorithm>
#include <cstring>

#include "ceilings.hpp"
#include "command.hpp"
#include "mix.hpp"

namespace keyfold::cli {
namespace {

std::int64_t count_of(const Dims& sizes) { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }

/// Sign, exponent -2 to 0 and mantissa from random bits: no conversion, no zero, NaN or infinity.
template <typename Bits>
Bits element(std::uint64_t random, int mantissa_bits, std::uint64_t exponent_of_one) {
  const std::uint64_t mantissa = random & ((std::uint64_t{1} << mantissa_bits) - 1);
  const std::uint64_t exponent = exponent_of_one - (random >> 32) % 3;
  const std::uint64_t sign = random >> 63;
  return static_cast<Bits>(sign << (sizeof(Bits) * 8 - 1) | exponent << mantissa_bits | mantissa);
}

}  // namespace

RandomTensor::RandomTensor(DType dtype, const Dims& sizes, std::uint64_t seed, int num_threads,
                           const std::stop_token& stop_token)
    : data_(std::make_unique_for_overwrite<std::byte[]>(
          static_cast<std::size_t>(count_of(sizes) * size_of(dtype)))),
      view_(data_.get(), dtype, sizes) {
  const std::int64_t count = count_of(sizes), part = count / num_threads;
  timed_on_threads(num_threads, [&](int thread) {
    constexpr std::int64_t kStep = 1 << 20;  // elements between two looks at the token
    const std::int64_t end = thread + 1 == num_threads ? count : part * (thread + 1);
    for (std::int64_t i = part * thread; i < end && !stop_token.stop_requested(); i += kStep)
      fill(i, std::min(i + kStep, end), mix(seed));
  });
  check_stop(stop_token);
}

void RandomTensor::fill(std::int64_t begin, std::int64_t end, std::uint64_t seed) {
  std::byte* target = data_.get() + begin * size_of(view_.dtype);
  const auto put = [&](auto bits) {
    std::memcpy(target, &bits, sizeof bits);
    target += sizeof bits;
  };
  for (std::int64_t i = begin; i < end; ++i) {
    const std::uint64_t random = mix(seed + static_cast<std::uint64_t>(i));
    switch (view_.dtype) {
      case DType::kFloat32: put(element<std::uint32_t>(random, 23, 127)); break;
      case DType::kFloat16: put(element<std::uint16_t>(random, 10, 15)); break;
      default: put(element<std::uint16_t>(random, 7, 127)); break;
    }
  }
}

}  // namespace keyfold::cli

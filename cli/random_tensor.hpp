// Random tensors for timing: any dtype, filled by several threads, the same for the same seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <keyfold/tensor.hpp>
#include <memory>
#include <stop_token>

namespace keyfold::cli {

/// Owns a dense tensor whose elements have either sign and sizes between 1/4 and 2.
class RandomTensor {
 public:
  /// Throws Cancelled, within milliseconds, when the token is set.
  RandomTensor(DType dtype, const Dims& sizes, std::uint64_t seed, int num_threads,
               const std::stop_token& stop_token);
  const MutableTensorView& view() const { return view_; }

 private:
  void fill(std::int64_t begin, std::int64_t end, std::uint64_t seed);

  std::unique_ptr<std::byte[]> data_;
  MutableTensorView view_;
};

}  // namespace keyfold::cli

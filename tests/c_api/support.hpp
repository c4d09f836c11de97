// Tensors and calls that the tests of the C API share.
#pragma once

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "keyfold/keyfold.h"
#include "keyfold/keyfold.hpp"

namespace keyfold::test {

/// A dense tensor of random float32 in [-1, 1], as DLTensor and as view.
class Tensor {
 public:
  explicit Tensor(const Dims& sizes, unsigned seed = 0) : sizes_(sizes) {
    std::mt19937 rng(seed);
    std::uniform_real_distribution<float> uniform(-1, 1);
    values_.resize(static_cast<std::size_t>(sizes[0] * sizes[1] * sizes[2] * sizes[3]));
    for (float& value : values_) value = uniform(rng);
  }

  /// `shape` stays the tensor's own, so that a test may change the struct.
  DLTensor dl() {
    return {values_.data(), {kDLCPU, 0}, 4, {kDLFloat, 32, 1}, sizes_.data(), nullptr, 0};
  }
  MutableTensorView view() { return {values_.data(), DType::kFloat32, sizes_}; }
  std::vector<float>& values() { return values_; }

  /// Equal bit by bit.
  friend bool operator==(const Tensor& a, const Tensor& b) {
    return a.values_.size() == b.values_.size() &&
           std::memcmp(a.values_.data(), b.values_.data(), a.values_.size() * 4) == 0;
  }

 private:
  Dims sizes_;
  std::vector<float> values_;
};

/// Tensors of one call: batch 2, 4 query heads over 2, q_len 3, 2500 keys, dims 40 and 24.
struct Call {
  static constexpr std::int64_t kKeys = 2500;
  Tensor q{{2, 4, 3, 40}, 1}, k{{2, 2, kKeys, 40}, 2}, v{{2, 2, kKeys, 24}, 3};
  Tensor out{{2, 4, 3, 24}, 4}, lse{{2, 4, 3, 1}, 5};

  keyfold_status attend(const keyfold_options* options = nullptr) {
    const DLTensor q_dl = q.dl(), k_dl = k.dl(), v_dl = v.dl(), out_dl = out.dl();
    return keyfold_scaled_dot_product_attention(&q_dl, &k_dl, &v_dl, &out_dl, options);
  }
};

/// Options that destroy themselves.
inline auto make_options() {
  keyfold_options* options = nullptr;
  keyfold_options_create(&options);
  return std::unique_ptr<keyfold_options, decltype(&keyfold_options_destroy)>(
      options, keyfold_options_destroy);
}

/// Whether the thread's last message begins with the argument's name.
inline bool error_names(const std::string& argument) {
  return std::string(keyfold_last_error()).rfind(argument + ": ", 0) == 0;
}

}  // namespace keyfold::test

// A tensor that owns its memory, in any layout, with garbage or poison wherever no element is.
#pragma once

#include <cstddef>
#include <functional>
#include <limits>
#include <string_view>
#include <vector>

#include "keyfold/tensor.hpp"

namespace keyfold::test {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

enum class Layout {
  kDense,        ///< [batch, heads, len, dim]
  kTransposed,   ///< [batch, len, heads, dim]
  kSliced,       ///< a dense tensor cut out of one that is larger on every axis
  kStridedDim,   ///< every second element of the innermost axis
  kRepeatHeads,  ///< one head, repeated with a stride of 0
  kRepeatKeys,   ///< one row, repeated with a stride of 0
};
std::string_view name_of(Layout layout);

/// `value` rounded to the dtype.
float rounded(float value, DType dtype);
/// An element of a view of any dtype; true reads as 1.
float load(const TensorView& t, const Dims& i);

class Tensor {
 public:
  Tensor() = default;
  /// Filled with garbage (huge values and NaN), view and rest alike.
  Tensor(DType dtype, const Dims& sizes, Layout layout = Layout::kDense);

  DType dtype() const { return dtype_; }
  const Dims& sizes() const { return sizes_; }
  const Dims& strides() const { return strides_; }
  std::int64_t count() const { return sizes_[0] * sizes_[1] * sizes_[2] * sizes_[3]; }
  TensorView view() const { return {data(), dtype_, sizes_, strides_}; }
  MutableTensorView mutable_view() { return {data(), dtype_, sizes_, strides_}; }

  float at(const Dims& i) const { return load(view(), i); }
  void set(const Dims& i, float value);
  /// Calls visit(index) for every element, innermost axis fastest.
  void each(const std::function<void(const Dims&)>& visit) const;
  /// Every element = value().
  void fill(const std::function<float()>& value);

  /// Puts a NaN of a rare pattern everywhere, between the elements too.
  void poison();
  bool poisoned(const Dims& i) const;
  /// Nothing is written at all.
  bool untouched() const;
  /// Nothing but elements of the view is written.
  bool only_elements_written() const;
  /// The elements' bytes, dense.
  std::vector<std::byte> bytes() const;

 private:
  std::int64_t offset(const Dims& i) const {
    return i[0] * strides_[0] + i[1] * strides_[1] + i[2] * strides_[2] + i[3] * strides_[3];
  }
  const std::byte* data() const { return memory_.data() + begin_ * size_of(dtype_); }
  std::byte* data() { return memory_.data() + begin_ * size_of(dtype_); }
  std::int64_t capacity() const {
    return static_cast<std::int64_t>(memory_.size()) / size_of(dtype_);
  }
  bool poisoned_at(std::int64_t element) const;

  DType dtype_ = DType::kFloat32;
  Dims sizes_{}, strides_{};
  std::int64_t begin_ = 0;  // element of memory_ where the view begins
  std::vector<std::byte> memory_;
};

}  // namespace keyfold::test

// Python arrays as the library's views, without a copy.
#pragma once

#include <nanobind/ndarray.h>

#include <initializer_list>
#include <keyfold/tensor.hpp>
#include <optional>
#include <string_view>
#include <vector>

namespace keyfold::python {

namespace nb = nanobind;

/// The axes of [batch, heads, len, dim] that an array may have; those it lacks are 1.
using Axes = std::initializer_list<std::size_t>;
inline constexpr Axes kAllAxes = {0, 1, 2, 3};
inline constexpr Axes kLseAxes = {0, 1, 2};
inline constexpr Axes kSinksAxes = {1};

/// An array of any library that speaks DLPack or the buffer protocol. Keeps its memory alive; is
/// made, moved and destroyed with the GIL held.
class Array {
 public:
  /// The stream on which an array of a CUDA device will be used, as a number; none for arrays that
  /// have to be in host memory.
  using Stream = std::optional<std::uintptr_t>;

  /// Throws TypeError when `object` is no array, InvalidArgument when its memory can't be used.
  static Array to_read(nb::handle object, const char* name, Stream stream = {});
  static Array to_write(nb::handle object, const char* name, Stream stream = {});

  /// The view of an array that has these axes.
  MutableTensorView view(Axes axes = kAllAxes) const;
  std::vector<std::int64_t> shape() const;
  DType dtype() const { return dtype_; }
  Device device() const;
  /// The view of an array that has the last of the four axes, however many (NumPy's broadcasting).
  MutableTensorView view_trailing() const;

 private:
  Array(nb::ndarray<nb::ro> held, DType dtype, const char* name)
      : held_(std::move(held)), dtype_(dtype), name_(name) {}
  static Array checked(nb::ndarray<nb::ro> held, bool bfloat16_bits, const char* name,
                       Stream stream);
  MutableTensorView view_of_axes(const std::size_t* axes, std::size_t count) const;

  nb::ndarray<nb::ro> held_;
  DType dtype_;
  const char* name_;
};

/// The address of the [batch] lengths that an int32 array on a CUDA device holds, and what keeps it
/// alive. Throws InvalidArgument for another dtype, or more axes.
std::pair<nb::ndarray<nb::ro>, const std::int32_t*> device_lengths(nb::handle object,
                                                                   std::uintptr_t stream);

/// The dtype of q, k and v by its name; throws InvalidArgument for another.
DType dtype_named(std::string_view name);

/// A new dense array in host memory, uninitialised, that other libraries take by DLPack.
nb::object make_empty(const std::vector<std::size_t>& shape, std::string_view dtype);

}  // namespace keyfold::python

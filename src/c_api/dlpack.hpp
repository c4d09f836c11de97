// DLPack tensors as the library's views.
#pragma once

#include <initializer_list>
#include <optional>

#include "keyfold/keyfold.h"
#include "keyfold/tensor.hpp"

namespace keyfold::c_api {

/// This and the views throw InvalidArgument that names the argument.
DType dtype_of(const DLDataType& dtype, const char* argument);

/// View of a borrowed tensor with four axes or, where short_axes is given, with only those of
/// [batch, heads, len, dim]; the others are then 1. NULL data is left for the library to judge.
MutableTensorView view_of(const DLTensor* tensor, const char* argument,
                          std::initializer_list<int> short_axes = {});

/// view_of() where NULL stands for no tensor.
std::optional<MutableTensorView> optional_view_of(const DLTensor* tensor, const char* argument,
                                                  std::initializer_list<int> short_axes = {});

/// The inverse of dtype_of().
DLDataType dl_dtype_of(DType dtype);

/// The axes of an lse [batch, num_heads, q_len] and of sinks [num_heads].
inline constexpr std::initializer_list<int> kLseAxes = {0, 1, 2};
inline constexpr std::initializer_list<int> kSinksAxes = {1};

}  // namespace keyfold::c_api

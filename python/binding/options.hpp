// AttentionOptions as Python makes them, with the arrays that they refer to.
#pragma once

#include <keyfold/options.hpp>
#include <optional>
#include <vector>

#include "array.hpp"

namespace keyfold::python {

struct Options {
  AttentionOptions attention;  ///< all but kv_lens and progress
  std::vector<std::int64_t> kv_lens;
  std::optional<Array> mask, sinks;  ///< keep the memory of attention's views alive
  Array::Stream stream;              ///< for arrays on a CUDA device
  nb::ndarray<nb::ro> device_kv_lens;

  /// The options of a call; they refer to this object.
  AttentionOptions for_call() const;
};

void bind_options(nb::module_& module);

}  // namespace keyfold::python

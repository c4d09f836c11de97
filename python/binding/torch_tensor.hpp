// PyTorch's tensors by their attributes: their __dlpack__ takes tens of microseconds on a CUDA
// device.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

namespace keyfold::python {

namespace nb = nanobind;

/// What __dlpack__ would give, for a plain tensor that needs no work to be handed over: on the
/// host, or on a CUDA device with its work queued on `stream` already. Invalid for all else, also
/// for what
/// __dlpack__ refuses.
nb::ndarray<nb::ro> from_torch(nb::handle object, std::optional<std::uintptr_t> stream);

}  // namespace keyfold::python

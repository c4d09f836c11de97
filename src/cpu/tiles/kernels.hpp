// The kernels on matrix tiles (Intel AMX), for prefill of float16 and bfloat16. Decode is left to
// the vector kernels, which read keys and values where they lie and are faster at it.
//
// A tile product is rows of a first operand times a second one, whose words are pairs of numbers
// one row further down. Query rows and weights are first operands as they are; keys and values are
// packed to be second ones, once for many rows.
//
// Products are of bfloat16, sums are float32. A float16 is the exact sum of two bfloat16; a weight
// is rounded to such a sum. docs/numerics.md has the arithmetic.
#pragma once

#include <optional>

#include "cpu/kernels.hpp"

namespace keyfold::cpu::tiles {

/// Kernels for `dtype` (float16 or bfloat16) on the processor's tiles, the rest taken from
/// `vectors`; none where processor or system lack AMX.
std::optional<Kernels> amx_kernels(const Kernels& vectors, DType dtype, const char* name);

/// The same on emulated tiles: the same bits, slowly. None where there is not even AVX2.
std::optional<Kernels> emulated_kernels(const Kernels& vectors, DType dtype, const char* name);

}  // namespace keyfold::cpu::tiles

// The kernels on matrix tiles (Intel AMX), for float16 and bfloat16.
//
// Scores are computed transposed, 16 keys x 16 rows to a tile, so that each vector lane is a query
// row: the softmax works down the keys and needs no sum or maximum across lanes. Weights, as pairs
// of keys, are then what the tile product wants as its second operand, and outputs come out
// transposed as well.
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

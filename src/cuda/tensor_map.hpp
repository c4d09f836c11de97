// Tensor maps: what the copy engine of compute capability 9.0 and later (TMA) is told of q, k and
// v.
#pragma once

#include <array>

#include "core/problem.hpp"
#include "cuda/driver.hpp"
#include "cuda/kernel.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

/// Of q: (column, index, group of the block). Of k and v: (column, key of the chunk, head, batch
/// entry), all counted from 0; keys behind the chunk read as zero.
using TensorMaps = std::array<CUtensorMap, 3>;

TensorMaps encode_tensor_maps(const Driver& driver, const core::Problem& problem,
                              const TensorTiles& tiles, std::int64_t groups,
                              const gpu::Params& params);

}  // namespace keyfold::cuda

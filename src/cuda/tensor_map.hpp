// Tensor maps: what the copy engine of compute capability 9.0 and later (TMA) is told of q, k, v
// and the mask.
#pragma once

#include <array>

#include "core/problem.hpp"
#include "cuda/driver.hpp"
#include "cuda/ends.hpp"
#include "cuda/kernel.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

/// Of q: (column, head of the group, row of the block, group, batch entry), or, where q is
/// gathered, (column, 0, index, group of the block, 0). Of k and v: (column, key of the chunk,
/// head, batch entry), all counted from 0; keys behind the chunk read as zero. Of the mask, or
/// nothing: (key of the chunk, query head, row of the block, batch entry); an axis that it is
/// broadcast over has one place.
using TensorMaps = std::array<CUtensorMap, 4>;

/// `q`: where it is, if it is not gathered; see maps_queries().
TensorMaps encode_tensor_maps(const Driver& driver, const core::Problem& problem,
                              const TensorTiles& tiles, const core::Block& block,
                              const gpu::Params& params, const TensorRows& q);

/// Whether a map can read q where it is: rows of whole words, a number of heads that divides tiles.
bool maps_queries(const core::Problem& problem, const TensorTiles& tiles, const TensorRows& q);

/// Whether a map can read the chunk's mask: rows of whole words, one key behind the other.
bool maps_mask(const core::Problem& problem, const gpu::Params& params);

}  // namespace keyfold::cuda

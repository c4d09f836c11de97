// The two ways to merge the states of all ranks.
#pragma once

#include "ranks/job.hpp"

namespace keyfold::ranks {

/// By reductions: all ranks compute a block at the same time, then a maximum and sums rescaled to
/// it give the merged state; while these are on their way, the next block is computed.
void merge_by_reductions(Job& job, std::int64_t block_bytes);

/// In the order of the keys: a block's state visits the ranks, each of which folds its keys into
/// it; while one rank works on a block, the one before it works on the next.
void merge_in_order(Job& job, std::int64_t block_bytes);

}  // namespace keyfold::ranks

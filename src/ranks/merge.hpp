// The ways to bring the rows and the keys of all ranks together.
#pragma once

#include "ranks/job.hpp"

namespace keyfold::ranks {

/// By reductions: all ranks compute a block at the same time, then a maximum and sums rescaled to
/// it give the merged state; while these are on their way, the next block is computed.
void merge_by_reductions(Job& job, std::int64_t block_bytes);

/// In the order of the keys, of rows that all ranks have: a block's state visits the ranks, each of
/// which folds its keys into it; while one works on a block, the one before works on the next.
void merge_in_order(Job& job, std::int64_t block_bytes);

/// In the order of the keys, of rows that each rank has for itself: the keys visit the ranks, about
/// `block_bytes` at a time, each of which folds them into the states of its rows; while these are
/// folded, the next are on their way.
void fold_passing_keys(Job& job, std::int64_t block_bytes);

}  // namespace keyfold::ranks

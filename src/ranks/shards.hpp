// Which rank has which keys.
#pragma once

#include <span>
#include <vector>

#include "keyfold/context_parallel.hpp"

namespace keyfold::ranks {

/// Keys that follow each other on one rank.
struct Segment {
  int rank = 0;
  KeySpan keys;
  std::int64_t first_row = 0;  ///< of the rank's k and v
};

/// All keys in ascending order, when rank r has counts[r] of them. Throws InvalidArgument where
/// stripes would give the ranks other numbers of keys.
std::vector<Segment> segments_of(std::span<const std::int64_t> counts, std::int64_t stripe_len);

inline constexpr int kAllRanks = -1;

/// Throws InvalidArgument unless the segments of `rank` begin at splits of this rank's kernel.
void check_begins(const std::vector<Segment>& segments, int rank, std::int64_t split_len,
                  std::int64_t stripe_len);

}  // namespace keyfold::ranks

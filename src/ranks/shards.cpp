// Contiguous shares and stripes.
#include "ranks/shards.hpp"

#include <algorithm>
#include <numeric>
#include <string>

#include "keyfold/error.hpp"

namespace keyfold {
namespace ranks {

std::vector<Segment> segments_of(std::span<const std::int64_t> counts, std::int64_t stripe_len) {
  const auto num_ranks = static_cast<int>(counts.size());
  const std::int64_t kv_len = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  std::vector<Segment> segments;
  std::vector<std::int64_t> used(counts.size(), 0);
  const auto add = [&](int rank, std::int64_t begin, std::int64_t count) {
    std::int64_t& row = used[static_cast<std::size_t>(rank)];
    if (count > 0 && !segments.empty() && segments.back().rank == rank) {
      segments.back().keys.end += count;  // one rank alone has stripes that follow each other
    } else if (count > 0) {
      segments.push_back({rank, {begin, begin + count}, row});
    }
    row += count;
  };
  std::int64_t begin = 0;
  if (stripe_len == 0) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      const std::int64_t count = counts[static_cast<std::size_t>(rank)];
      add(rank, begin, count);
      begin += count;
    }
    return segments;
  }
  for (int rank = 0; begin < kv_len; rank = (rank + 1) % num_ranks, begin += stripe_len) {
    add(rank, begin, std::min(stripe_len, kv_len - begin));
  }
  for (std::size_t rank = 0; rank < counts.size(); ++rank) {
    if (used[rank] == counts[rank]) continue;
    throw InvalidArgument("k", "expected " + std::to_string(used[rank]) + " keys on rank " +
                                   std::to_string(rank) + ", its stripes of " +
                                   std::to_string(stripe_len) + " of the " +
                                   std::to_string(kv_len) + " keys of all ranks, got " +
                                   std::to_string(counts[rank]) + "; see shard_keys()");
  }
  return segments;
}

void check_begins(const std::vector<Segment>& segments, int rank, std::int64_t split_len,
                  std::int64_t stripe_len) {
  if (stripe_len % split_len != 0) {
    throw InvalidArgument(
        "stripe_len", "expected a multiple of split_len = " + std::to_string(split_len) + ", got " +
                          std::to_string(stripe_len));
  }
  for (const Segment& segment : segments) {
    if (rank != kAllRanks && segment.rank != rank) continue;
    if (segment.keys.begin % split_len == 0) continue;
    throw InvalidArgument(
        "k", "expected keys from a multiple of split_len = " + std::to_string(split_len) +
                 " on, got the first at " + std::to_string(segment.keys.begin) +
                 ", where the keys of the ranks before end; see shard_keys()");
  }
}

}  // namespace ranks

namespace {

void check_shards(const char* name, std::int64_t len, int num_ranks, int rank) {
  const auto check = [](const char* what, bool good, const std::string& expected,
                        std::int64_t got) {
    if (good) return;
    throw InvalidArgument(what, "expected " + expected + ", got " + std::to_string(got));
  };
  check(name, len >= 0, "at least 0", len);
  check("num_ranks", num_ranks >= 1, "at least 1", num_ranks);
  check("rank", rank >= 0 && rank < num_ranks, "0 to " + std::to_string(num_ranks - 1), rank);
}

}  // namespace

std::vector<KeySpan> shard_keys(std::int64_t kv_len, int num_ranks, int rank,
                                std::int64_t split_len, std::int64_t stripe_len) {
  check_shards("kv_len", kv_len, num_ranks, rank);
  if (split_len < 1) {
    throw InvalidArgument("split_len", "expected at least 1, got " + std::to_string(split_len));
  }
  if (stripe_len < 0 || stripe_len % split_len != 0) {
    throw InvalidArgument(
        "stripe_len", "expected a multiple of split_len = " + std::to_string(split_len) + ", got " +
                          std::to_string(stripe_len));
  }
  std::vector<KeySpan> spans;
  const auto add = [&](std::int64_t begin, std::int64_t end) {
    end = std::min(end, kv_len);
    if (begin < end) spans.push_back({begin, end});
  };
  if (stripe_len == 0) {
    const std::int64_t splits = (kv_len + split_len - 1) / split_len;
    // splits * rank could overflow; whole shares and the rest apart cannot.
    const std::int64_t share = splits / num_ranks, rest = splits % num_ranks;
    const auto bound = [&](std::int64_t r) {
      return (share * r + rest * r / num_ranks) * split_len;
    };
    add(bound(rank), bound(rank + 1));
  } else {
    for (std::int64_t begin = rank * stripe_len; begin < kv_len; begin += num_ranks * stripe_len) {
      add(begin, begin + stripe_len);
    }
  }
  return spans;
}

std::vector<KeySpan> shard_rows(std::int64_t q_len, int num_ranks, int rank,
                                std::int64_t row_stripe_len) {
  check_shards("q_len", q_len, num_ranks, rank);
  if (row_stripe_len < 1) {
    throw InvalidArgument("row_stripe_len",
                          "expected at least 1, got " + std::to_string(row_stripe_len));
  }
  std::vector<KeySpan> spans;
  const std::int64_t round = 2 * std::int64_t{num_ranks} * row_stripe_len;  // there and back
  for (std::int64_t first = 0; first < q_len; first += round) {
    for (const std::int64_t stripe : {rank, 2 * num_ranks - 1 - rank}) {
      const std::int64_t begin = first + stripe * row_stripe_len;
      if (begin < q_len) spans.push_back({begin, std::min(q_len, begin + row_stripe_len)});
    }
  }
  return spans;
}

}  // namespace keyfold

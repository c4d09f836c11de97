#include "ranks/shares.hpp"

#include <algorithm>
#include <numeric>
#include <ostream>

namespace keyfold::test {
namespace {

/// `total` in `parts` parts drawn at random, in units.
std::vector<std::int64_t> cut(Rng& rng, std::int64_t total, int parts, std::int64_t unit) {
  std::vector<std::int64_t> bounds{0};
  for (int i = 1; i < parts; ++i) bounds.push_back(rng.between(0, total / unit) * unit);
  std::sort(bounds.begin(), bounds.end());
  bounds.push_back(total);
  std::vector<std::int64_t> lengths;
  for (std::size_t i = 1; i < bounds.size(); ++i) lengths.push_back(bounds[i] - bounds[i - 1]);
  return lengths;
}

void copy_rows(const TensorView& from, std::int64_t begin, Tensor& to, std::int64_t to_row,
               std::int64_t count) {
  for (std::int64_t b = 0; b < from.sizes[0]; ++b)
    for (std::int64_t h = 0; h < from.sizes[1]; ++h)
      for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t d = 0; d < from.sizes[3]; ++d)
          to.set({b, h, to_row + i, d}, load(from, {b, h, begin + i, d}));
}

Tensor with_rows(const TensorView& like, std::int64_t rows, Layout layout) {
  return Tensor(like.dtype, {like.sizes[0], like.sizes[1], rows, like.sizes[3]}, layout);
}

}  // namespace

Spread Spread::random(Rng& rng, const Call& call, int num_ranks, std::int64_t split_len) {
  Spread spread;
  spread.num_ranks = num_ranks;
  const std::int64_t kv_len = call.k.sizes[2], q_len = call.q.sizes[2];
  if (rng.one_in(2)) spread.queries = Queries::kOwn;
  if (rng.one_in(2)) spread.order = MergeOrder::kOrdered;
  if (rng.one_in(2)) spread.block_bytes = rng.between(1, 20'000);
  spread.kv_lens = cut(rng, kv_len, num_ranks, split_len);
  if (rng.one_in(2)) {
    spread.stripe_len = split_len * rng.between(1, 2);
    for (int rank = 0; rank < num_ranks; ++rank) {
      std::int64_t count = 0;
      for (const KeySpan& span : shard_keys(kv_len, num_ranks, rank, split_len, spread.stripe_len))
        count += span.end - span.begin;
      spread.kv_lens[static_cast<std::size_t>(rank)] = count;
    }
  }
  spread.q_lens = cut(rng, q_len, num_ranks, 1);
  if (rng.one_in(2)) {
    spread.row_stripe_len = rng.between(1, 12);
    for (int rank = 0; rank < num_ranks; ++rank) {
      std::int64_t& count = spread.q_lens[static_cast<std::size_t>(rank)] = 0;
      for (const KeySpan& span : shard_rows(q_len, num_ranks, rank, spread.row_stripe_len))
        count += span.end - span.begin;
    }
  }
  return spread;
}

std::vector<KeySpan> Spread::rows(int rank) const {
  const auto before = q_lens.begin() + rank;
  const std::int64_t first = std::accumulate(q_lens.begin(), before, std::int64_t{0});
  const std::int64_t q_len = std::accumulate(before, q_lens.end(), first);
  if (row_stripe_len == 0) return {{first, first + *before}};
  return shard_rows(q_len, num_ranks, rank, row_stripe_len);
}

std::ostream& operator<<(std::ostream& to, const Spread& spread) {
  to << spread.num_ranks << " ranks, "
     << (spread.queries == Queries::kOwn ? "own rows, " : "replicated, ")
     << (spread.order == MergeOrder::kOrdered ? "ordered" : "reduce") << ", stripes of "
     << spread.stripe_len << ", row stripes of " << spread.row_stripe_len << ", blocks of "
     << spread.block_bytes << ", keys";
  for (const std::int64_t count : spread.kv_lens) to << ' ' << count;
  to << ", rows";
  for (const std::int64_t count : spread.q_lens) to << ' ' << count;
  return to;
}

RankCall::RankCall(const Call& call, const Spread& spread, int rank) {
  const auto at = static_cast<std::size_t>(rank);
  const bool own = spread.queries == Queries::kOwn;
  const std::int64_t rows = own ? spread.q_lens[at] : call.q.sizes[2];
  const Layout layout = rank % 2 ? Layout::kTransposed : Layout::kSliced;
  q_ = with_rows(call.q, rows, layout);
  std::int64_t next = 0;
  for (const KeySpan& span : own ? spread.rows(rank) : std::vector<KeySpan>{{0, call.q.sizes[2]}}) {
    copy_rows(call.q, span.begin, q_, next, span.end - span.begin);
    next += span.end - span.begin;
  }
  q = q_.view();
  k = with_rows(call.k, spread.kv_lens[at], layout);
  v = with_rows(call.v, spread.kv_lens[at], layout);
  std::int64_t row = 0;
  const auto take = [&](std::int64_t begin, std::int64_t count) {
    copy_rows(call.k, begin, k, row, count);
    copy_rows(call.v, begin, v, row, count);
    row += count;
  };
  if (spread.stripe_len == 0) {
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < at; ++i) begin += spread.kv_lens[i];
    take(begin, spread.kv_lens[at]);
  } else {
    for (const KeySpan& span :
         shard_keys(call.k.sizes[2], spread.num_ranks, rank, spread.stripe_len, spread.stripe_len))
      take(span.begin, span.end - span.begin);
  }
  out = Tensor(call.q.dtype, {q.sizes[0], q.sizes[1], rows, call.v.sizes[3]}, layout);
  lse = Tensor(DType::kFloat32, {q.sizes[0], q.sizes[1], rows, 1}, layout);
  out.poison();
  lse.poison();
  options.attention = call.options;
  options.attention.lse = lse.mutable_view();
  options.queries = spread.queries;
  options.order = spread.order;
  options.stripe_len = spread.stripe_len;
  options.row_stripe_len = spread.row_stripe_len;
  options.block_bytes = spread.block_bytes;
  options.timeout_seconds = 60;
}

Outputs gathered(const Call& call, const Spread& spread, const std::vector<RankCall>& parts) {
  const Dims sizes = call.out_sizes();
  Outputs all{
      Tensor(call.q.dtype, sizes), Tensor(DType::kFloat32, {sizes[0], sizes[1], sizes[2], 1}), {}};
  all.out.poison();
  all.lse.poison();
  for (int rank = 0; rank < spread.num_ranks; ++rank) {
    const RankCall& part = parts[static_cast<std::size_t>(rank)];
    EXPECT_TRUE(part.out.only_elements_written() && part.lse.only_elements_written());
    const bool own = spread.queries == Queries::kOwn;
    if (!own) {
      EXPECT_TRUE(part.out.bytes() == parts.front().out.bytes());
      EXPECT_TRUE(part.lse.bytes() == parts.front().lse.bytes());
    }
    std::int64_t next = 0;
    for (const KeySpan& span : own ? spread.rows(rank) : std::vector<KeySpan>{{0, sizes[2]}}) {
      copy_rows(part.out.view(), next, all.out, span.begin, span.end - span.begin);
      copy_rows(part.lse.view(), next, all.lse, span.begin, span.end - span.begin);
      next += span.end - span.begin;
    }
  }
  return all;
}

}  // namespace keyfold::test

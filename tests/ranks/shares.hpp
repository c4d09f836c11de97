// A call's keys and rows, spread over ranks; what each rank is to give and to get.
#pragma once

#include <vector>

#include "keyfold/context_parallel.hpp"
#include "support/backends.hpp"

namespace keyfold::test {

/// How a call is spread.
struct Spread {
  int num_ranks = 1;
  Queries queries = Queries::kReplicated;
  MergeOrder order = MergeOrder::kReduce;
  std::int64_t stripe_len = 0;
  std::int64_t row_stripe_len = 0;
  std::int64_t block_bytes = 4 << 20;
  std::vector<std::int64_t> kv_lens, q_lens;  ///< of each rank

  /// The rows of a rank with Queries::kOwn.
  std::vector<KeySpan> rows(int rank) const;

  /// Shares in whole splits and rows drawn at random, empty ones too.
  static Spread random(Rng& rng, const Call& call, int num_ranks, std::int64_t split_len);
};
std::ostream& operator<<(std::ostream& to, const Spread& spread);

/// One rank's tensors of a spread call.
class RankCall {
 public:
  RankCall(const Call& call, const Spread& spread, int rank);

  /// The call, into poisoned outputs.
  ContextParallelReport run(ContextParallel& ranks) {
    return ranks.scaled_dot_product_attention(q, k.view(), v.view(), out.mutable_view(), options);
  }
  bool untouched() const { return out.untouched() && lse.untouched(); }

  TensorView q;
  Tensor k, v;
  Tensor out, lse;
  ContextParallelOptions options;

 private:
  Tensor q_;
};

/// The results of all ranks as those of the call: each rank's with Queries::kOwn, else rank 0's,
/// after a check that all have the same bits.
Outputs gathered(const Call& call, const Spread& spread, const std::vector<RankCall>& parts);

}  // namespace keyfold::test

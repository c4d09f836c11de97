// Attention over keys that are spread over many processes, each with its own memory.
#pragma once

#include <exception>
#include <memory>
#include <vector>

#include "keyfold/attention.hpp"
#include "keyfold/transport.hpp"

namespace keyfold {

/// Keys, or query rows, [begin, end) by their number in the whole.
struct KeySpan {
  std::int64_t begin = 0, end = 0;
  bool operator==(const KeySpan&) const = default;
};

/// The keys of one rank, ascending: of `kv_len` keys in equal shares of whole splits, contiguous in
/// the order of the ranks, or with stripe_len > 0 in stripes of so many keys that the ranks take in
/// turn, which balances causal work. stripe_len is a multiple of split_len (see plan()). Throws
/// InvalidArgument.
KEYFOLD_API std::vector<KeySpan> shard_keys(std::int64_t kv_len, int num_ranks, int rank,
                                            std::int64_t split_len, std::int64_t stripe_len = 0);

/// The query rows of one rank, ascending, in stripes that the ranks take in turn, there and back
/// (0, 1, ... n-1, n-1, ... 0): with two stripes for each, of q_len / (2 num_ranks) rows, causal
/// work is the same on all. Throws InvalidArgument.
KEYFOLD_API std::vector<KeySpan> shard_rows(std::int64_t q_len, int num_ranks, int rank,
                                            std::int64_t row_stripe_len);

/// Whose the queries are.
enum class Queries : std::uint8_t {
  kReplicated,  ///< every rank has all rows and gets all results: decode
  kOwn,         ///< each rank has rows of its own and gets their results: prefill
};

/// How the keys of all ranks come together.
enum class MergeOrder : std::uint8_t {
  kReduce,   ///< states by reductions: a maximum, then sums rescaled to it; exact up to float32
             ///< rounding
  kOrdered,  ///< in the order of the keys: the bits of a call of one process with all keys
};

/// Options of ContextParallel::scaled_dot_product_attention(), the same on all ranks but for
/// attention.run and the data of attention.lse.
struct ContextParallelOptions {
  /// What to compute. Positions count in the whole sequence: kv_len is the sum of the ranks', q_len
  /// with Queries::kOwn too, whose rows lie as row_stripe_len says. mask, sinks
  /// and kv_lens are those of the whole: of a mask, each rank reads only its keys' columns.
  AttentionOptions attention;
  Queries queries = Queries::kReplicated;
  MergeOrder order = MergeOrder::kReduce;
  /// How the keys lie, as in shard_keys(): 0 contiguous, in any unequal or empty shares of whole
  /// splits, of which the last that is not empty may have a ragged end.
  std::int64_t stripe_len = 0;
  /// How the rows lie with Queries::kOwn: as in shard_rows(), or with 0 one rank's behind the
  /// other's, in any unequal or empty shares.
  std::int64_t row_stripe_len = 0;
  /// What is computed and sent together, state or keys, in bytes, about: while one block is on its
  /// way the next is computed.
  std::int64_t block_bytes = 4 << 20;
  /// Longest time to wait for another rank in one go, in seconds: more than a rank takes for the
  /// dispatches of a block.
  double timeout_seconds = 300;
};

/// How a call ran on this rank.
struct ContextParallelReport {
  Report report;                   ///< of this rank's dispatches and time
  std::int64_t kv_len = 0;         ///< keys of all ranks
  std::int64_t messages = 0;       ///< collective operations and messages begun by this rank
  std::int64_t message_bytes = 0;  ///< their buffers, in and out, without what a collective repeats
  double waiting_ms = 0;           ///< time in which this rank did nothing but wait for others
};

/// Attention of many ranks, each with a share of the keys ("context parallelism").
///
/// Every function is called by all ranks together, in the same order. After a PeerError for a rank
/// that did not answer this object can only be destroyed, and what was sent is never received: end
/// the process (MPI_Abort).
class KEYFOLD_API ContextParallel {
 public:
  /// Communicates through `transport`.
  explicit ContextParallel(std::unique_ptr<Transport> transport);
  ~ContextParallel();
  ContextParallel(ContextParallel&&) noexcept;
  ContextParallel& operator=(ContextParallel&&) noexcept;

  int rank() const noexcept;
  int num_ranks() const noexcept;

  /// keyfold::scaled_dot_product_attention() of q over the keys of all ranks.
  ///
  /// k [batch, num_kv_heads, n, head_dim] and v [..., n, value_dim] are this rank's keys, n >= 0,
  /// in ascending order. q [batch, num_heads, q_len, head_dim] and out [..., q_len, value_dim] are
  /// all rows or this rank's, as options.queries says. All tensors are in host memory.
  ///
  /// Cost for a rank, beside the dispatches: an all-gather of 32 bytes, and
  /// - kReduce: for each row and head all-reduces of 4 bytes (maximum) and of 4 (value_dim + 1)
  ///   bytes (sums); with Queries::kOwn reduce-scatters instead of the second, and an all-gather of
  ///   q. All ranks compute at the same time, the next block while one is on its way.
  /// - kOrdered, replicated: a state of 4 (value_dim + 2) bytes a row and head travels from rank to
  ///   rank, and from the last to all. Ranks compute at the same time as far as there are blocks.
  /// - kOrdered, own: all keys and values pass by all ranks, by broadcasts of about block_bytes,
  ///   each folded while the next are on their way; again for every block of rows whose state does
  ///   not fit in max_scratch_bytes beside the others'. With few rows and many keys kReduce sends
  ///   less.
  /// Memory, beside a copy of the results: three blocks (kReduce), the state of all rows
  /// (kOrdered, replicated), or three pieces of keys (kOrdered, own).
  ///
  /// Bits: kOrdered gives those of one process; those of kReduce depend on the ranks' shares and on
  /// the transport's order of summing.
  ///
  /// Throws on every rank, with out and lse untouched: InvalidArgument where ranks disagree; what
  /// is wrong on this rank, or failed; PeerError where another rank failed, or did not answer
  /// within the timeout (and a fifth of it more, at least a second, to find out which).
  ///
  /// Source: Context Parallelism for Scalable Million-Token Inference (Yang et al. 2024), Tree
  /// Attention (Shyam et al. 2024).
  ContextParallelReport scaled_dot_product_attention(const TensorView& q, const TensorView& k,
                                                     const TensorView& v,
                                                     const MutableTensorView& out,
                                                     const ContextParallelOptions& options = {});

  /// Takes part in a call that this rank can't make, as it failed before: throws `failure`, and on
  /// the others, which make the call, PeerError with its text.
  void fail(const std::exception_ptr& failure, double timeout_seconds = 300);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace keyfold

// Attention over keys that arrive piece by piece.
#pragma once

#include <memory>

#include "keyfold/attention.hpp"

namespace keyfold {

/// The numbers of a state, float32, in host memory. Two states over disjoint keys merge by
///
///   m = max(m_a, m_b);  l = exp(m_a - m) l_a + exp(m_b - m) l_b;  o likewise
///
/// so that they can be kept, sent, and merged by others: by reductions over many machines, say.
struct StateView {
  MutableTensorView m;  ///< [batch, num_heads, q_len, 1]: the largest score seen; -inf: none was
  MutableTensorView l;  ///< [batch, num_heads, q_len, 1]: sum of exp(score - m), without sinks
  MutableTensorView o;  ///< [batch, num_heads, q_len, value_dim]: sum of exp(score - m) v
};

/// The running state (m, l, o) of attention for a fixed q, fed with keys as they come.
///
/// Feeding the keys of one call in any number of pieces, cut anywhere, gives the same bits as that
/// call: whole splits are folded as they complete, and the ragged end of what was fed (less than
/// one split) is kept in a small buffer.
///
/// The memory of q, of the mask and of sinks must outlive the state; keys and values need to live
/// only during update(). Where the formula needs the position of the queries (causal, window),
/// options.q_offset must be set, as kv_len is not known yet. A mask's key axis is the absolute key
/// position. options.lse is not used: finish() takes it.
///
/// One state is used by one thread at a time; different states are independent.
class KEYFOLD_API AttentionState {
 public:
  /// Begins for q [batch, num_heads, q_len, head_dim]. `first_key` is the absolute position of the
  /// first key that will be fed; it must be a multiple of the kernel's split_len (see plan()).
  /// Throws InvalidArgument or RunError.
  explicit AttentionState(const TensorView& q, const AttentionOptions& options = {},
                          std::int64_t first_key = 0);
  ~AttentionState();
  AttentionState(AttentionState&&) noexcept;
  AttentionState& operator=(AttentionState&&) noexcept;

  /// Folds the next keys: k [batch, num_kv_heads, n, head_dim], v [batch, num_kv_heads, n,
  /// value_dim], n >= 0. The first update fixes num_kv_heads and value_dim and allocates float32
  /// state for all rows, which must fit in max_scratch_bytes. On an error in the arguments the
  /// state is unchanged; after a Cancelled or a failure it can only be destroyed.
  void update(const TensorView& k, const TensorView& v);

  /// Goes on at another key, so that those between are not seen: `key` is a multiple of the
  /// kernel's split_len and at least next_key(). The bits are those of a call in which a mask hides
  /// them. Throws InvalidArgument, with the state unchanged.
  void skip_to(std::int64_t key);

  /// Adds the keys that `other` has seen; other is left empty. q, its shape and the options that
  /// define the formula must be the same and the keys disjoint. Exact up to float32 rounding: the
  /// order of merging is not the order of one call, so the bits may differ from it. This state can
  /// be fed further, from where it stood.
  void merge(AttentionState&& other);

  /// Writes out [batch, num_heads, q_len, value_dim] and, if given, lse [batch, num_heads, q_len,
  /// 1], and leaves the state empty, at first_key again. On an error in the arguments nothing is
  /// written and the state is unchanged.
  Report finish(const MutableTensorView& out,
                const std::optional<MutableTensorView>& lse = std::nullopt);

  /// Copies the state of all rows. The ragged end is folded for it: keys can be fed after that only
  /// from the begin of a split on. On an error in the arguments nothing is written.
  void save(const StateView& to);

  /// Takes these numbers for the keys seen so far, which are forgotten: what save() gave, or what
  /// several of these merge to, of the same q and formula. `num_kv_heads` is that of the keys.
  /// next_key() stays. With what the same kernel's save() gave, the bits are as if this state had
  /// seen the keys. On an error in the arguments the state is unchanged.
  void load(const StateView& from, std::int64_t num_kv_heads);

  /// Absolute position of the next key: first_key plus the keys fed and skipped so far.
  std::int64_t next_key() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace keyfold

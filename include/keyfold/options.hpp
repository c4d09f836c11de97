// What to compute (AttentionOptions) and how to run it (RunOptions).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <stop_token>
#include <string>

#include "keyfold/error.hpp"
#include "keyfold/tensor.hpp"

namespace keyfold {

/// How a call runs. None of these changes a bit of the result, except `backend`: two backends agree
/// up to rounding.
///
/// A field that is not set is taken from the environment variable named beside it, and else from
/// its default. A variable that does not parse or is out of range is an InvalidArgument.
struct RunOptions {
  /// Backend name, as devices() lists it. KEYFOLD_BACKEND; default: the one that
  /// holds the keys, if they are in a DeviceBuffer, else the first one that can (for tensors on a
  /// CUDA device only that device's).
  std::optional<std::string> backend;
  /// Longest device time of one dispatch in milliseconds, 0.1 to 60000. KEYFOLD_BUDGET_MS; default
  /// 100.
  std::optional<double> budget_ms;
  /// Keys per dispatch, >= 1, rounded up to whole splits. KEYFOLD_CHUNK_SIZE (older name
  /// MLX_SDPA_CHUNK_SIZE); default: chosen by the pacer from measured device time.
  std::optional<std::int64_t> chunk_size;
  /// With fewer keys than this, one dispatch per row block is made and the budget is not applied.
  /// >= 0. KEYFOLD_CHUNK_THRESHOLD (older name MLX_SDPA_CHUNK_THRESHOLD); default 0: always pace.
  std::optional<std::int64_t> chunk_threshold;
  /// Most scratch bytes for the state of the rows in flight and for packed keys; query rows are
  /// blocked to stay within it. KEYFOLD_MAX_SCRATCH_MB (MiB); default 256 MiB.
  std::optional<std::int64_t> max_scratch_bytes;
  /// CPU threads, 1 to 4096; of more than the process may use only those. KEYFOLD_NUM_THREADS;
  /// default: all that it may use.
  std::optional<int> num_threads;
  /// For tensors on a CUDA device: the stream (a CUstream or cudaStream_t of the device's primary
  /// context) in whose order the call works. Null is the device's default stream.
  void* stream = nullptr;
  /// Called on the calling thread after each dispatch. What it throws cancels the call and passes
  /// through.
  std::function<void(const Progress&)> progress;
  /// Ends the call with Cancelled at the next chunk boundary.
  std::stop_token stop_token;
};

/// Keys that a query at position p sees: p - left <= j <= p + right. Unset means unbounded.
struct Window {
  std::optional<std::int64_t> left;   ///< keys before the query's own position, >= 0
  std::optional<std::int64_t> right;  ///< keys after the query's own position, >= 0
};

/// What to compute; see scaled_dot_product_attention() for the formula.
struct AttentionOptions {
  /// Factor on q.k; finite. Default 1/sqrt(head_dim).
  std::optional<float> scale;
  /// Query i sees key j only if j <= its position (see q_offset).
  bool causal = false;
  /// Position of query row 0 among the keys; row i stands at q_offset + i. Default kv_len - q_len
  /// (with kv_lens: kv_lens[b] - q_len): bottom-right alignment. May be negative.
  std::optional<std::int64_t> q_offset;
  /// Sliding window around each query's position.
  Window window;
  /// Scores become softcap * tanh(score / softcap), before masks; finite, > 0.
  std::optional<float> softcap;
  /// [batch, num_heads, q_len, kv_len]; a size of 1 broadcasts. kBool: true = visible. float32 or
  /// the inputs' dtype: added to the scaled score; -inf hides the key.
  std::optional<TensorView> mask;
  /// [1, num_heads, 1, 1], float32 or the inputs' dtype: a logit per head that joins the
  /// denominator only.
  std::optional<TensorView> sinks;
  /// Keys of each batch entry, 0 to kv_len; keys behind are never read. Empty: kv_len for all.
  std::span<const std::int64_t> kv_lens;
  /// For tensors on a CUDA device, instead of kv_lens: [batch] on that device, read in the order of
  /// the stream, and taken as 0 below 0 and as kv_len above it. All of kv_len is planned for.
  const std::int32_t* device_kv_lens = nullptr;
  /// [batch, num_heads, q_len, 1] float32: receives the natural-log logsumexp, sinks included.
  std::optional<MutableTensorView> lse;
  /// How to run it.
  RunOptions run;
};

}  // namespace keyfold

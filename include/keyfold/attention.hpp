// Attention in one call, and the merge of finished results.
#pragma once

#include "keyfold/options.hpp"

namespace keyfold {

/// How a call ran.
struct Report {
  std::string backend;             ///< backend that ran it
  std::string kernel;              ///< its kernel
  std::int64_t dispatches = 0;     ///< dispatches made
  double longest_dispatch_ms = 0;  ///< longest device time of one dispatch
  double elapsed_ms = 0;           ///< wall time of the call
  std::int64_t scratch_bytes = 0;  ///< scratch that was allocated
  std::int64_t staging_bytes = 0;  ///< copy of out and lse, when the rows came in several blocks
  std::int64_t recoveries = 0;     ///< times that the device was lost and replaced
};

/// Exact scaled-dot-product attention over keys of any length.
///
///   score[i,j] = cap(scale * sum_d q[i,d] k[j,d]) + mask[i,j]
///
///   cap(x) = softcap * tanh(x / softcap)
///
///   out[i,:] = sum_j exp(score[i,j] - lse[i]) v[j,:]
///
///   lse[i] = log(sum_j exp(score[i,j]) + exp(sink))          (natural logarithm)
///
/// Shapes: q [batch, num_heads, q_len, head_dim]; k [batch, num_kv_heads, kv_len, head_dim];
/// v [batch, num_kv_heads, kv_len, value_dim]; out [batch, num_heads, q_len, value_dim]. num_heads
/// is a multiple of num_kv_heads; query head h reads key head h / (num_heads / num_kv_heads).
/// q, k, v and out share one dtype: float32, float16 or bfloat16; head_dim and value_dim 1 to 576.
///
/// Causal attention and windows are aligned bottom-right: query row i stands at key position
/// i + kv_len - q_len unless options.q_offset says otherwise. A row that sees no key gives 0 and
/// lse -inf (with a sink: 0 and the sink). A score of -inf is the same as a hidden key. Hidden
/// keys, and keys behind kv_lens, never influence the result, whatever they hold.
///
/// k and v may both be in a DeviceBuffer (device_memory.hpp); the call then runs on its backend.
///
/// All tensors (q, k, v, out, mask, sinks, lse) may be on one CUDA device (TensorView::device). No
/// byte of them passes through the host then, and the call works in the order of
/// RunOptions::stream: it waits for what is queued there, and what is queued there later finds the
/// result. It returns when all dispatches but the last are done, so that a call of one dispatch
/// waits for nothing: its time and what fails in it are not in the Report. out must not overlap an
/// input, and may hold anything after an error. While the stream is being captured into a CUDA
/// graph nothing is waited for; dispatches are cut for an estimated speed, and times are estimates.
///
/// Accumulates in float32. The bits of the result depend on q, k, v, the options that define the
/// formula and the kernel (DeviceInfo::kernel), and on nothing in RunOptions, on no other row and
/// on no other batch entry.
///
/// Cost: 2 * (head_dim + value_dim) flops per visible pair. Scratch is float32 state for the query
/// rows in flight, at most RunOptions::max_scratch_bytes, whatever kv_len is; less, in more blocks,
/// where memory is short. When the rows need
/// several blocks, a staging copy of out is held too, so that out is written only on success; out
/// may therefore alias an input.
///
/// Throws InvalidArgument, RunError (unsupported, out of memory, device failure) or Cancelled;
/// out and lse are then untouched.
///
/// Source: online softmax (Milakov and Gimelshein 2018), FlashAttention (Dao et al. 2022), chunked
/// keys merged by logsumexp (ml-explore/mlx#3307).
KEYFOLD_API Report scaled_dot_product_attention(const TensorView& q, const TensorView& k,
                                                const TensorView& v, const MutableTensorView& out,
                                                const AttentionOptions& options = {});

/// Merges two finished results over disjoint keys into the first:
///
///   lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
///
/// out_a, out_b: [batch, num_heads, q_len, value_dim], one dtype; lse_a, lse_b: [batch, num_heads,
/// q_len, 1] float32, natural logarithm. Results with sinks must carry them in one of the two only.
/// Where both lse are -inf the output is 0. Computes in float32 and rounds once to the dtype; use
/// AttentionState to keep float32 in between. Reads and writes each element once; allocates
/// nothing. Throws InvalidArgument, with out_a and lse_a untouched.
///
/// Source: merge_state of FlashInfer; Ye et al. 2024.
KEYFOLD_API void merge_state(const MutableTensorView& out_a, const MutableTensorView& lse_a,
                             const TensorView& out_b, const TensorView& lse_b);

}  // namespace keyfold

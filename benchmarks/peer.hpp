// The peer: ggml's CPU flash attention on the same data, if the build found ggml.
#pragma once

#include <keyfold/tensor.hpp>
#include <memory>
#include <vector>

namespace keyfold::benchmarks {

class Peer {
 public:
  virtual ~Peer() = default;
  /// Computes attention of all rows over all keys.
  virtual void run() = 0;
  /// The result in float32, [q_len, num_heads, value_dim].
  virtual const float* out() const = 0;
};

/// Null without ggml. Batch 1, dense k and v, which must outlive the peer; ggml takes q as float32.
std::unique_ptr<Peer> make_peer(const TensorView& q, const TensorView& k, const TensorView& v,
                                int num_threads);

}  // namespace keyfold::benchmarks

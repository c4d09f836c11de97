// What carries messages between the ranks of a ContextParallel: MPI (mpi.hpp), or one's own.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "keyfold/export.h"

namespace keyfold {

/// Messages between num_ranks() processes (or threads), each with one Transport.
///
/// All calls begin an operation and return; all ranks begin the same collective operations in the
/// same order. Buffers stay as they are until the request is done. A Transport is used by one
/// thread at a time. What its functions throw ends the call that uses it.
class KEYFOLD_API Transport {
 public:
  /// An operation under way. One that is destroyed before it is done is given up; its buffers are
  /// then never freed.
  class KEYFOLD_API Request {
   public:
    virtual ~Request() = default;
    /// Drives the operation on; whether it is complete, and from then on always true.
    virtual bool done() = 0;
  };
  using Pending = std::unique_ptr<Request>;
  enum class Reduction : std::uint8_t { kMax, kSum };

  virtual ~Transport() = default;
  virtual int rank() const = 0;       ///< this one, from 0
  virtual int num_ranks() const = 0;  ///< all, 1 or more

  /// all[r * bytes...] = the `mine` of rank r.
  virtual Pending all_gather(const void* mine, void* all, std::int64_t bytes) = 0;
  /// values[i] = the reduction of all ranks' values[i], on every rank.
  virtual Pending all_reduce(float* values, std::int64_t count, Reduction reduction) = 0;
  /// Sums, of which rank r gets the counts[r] that follow those of the ranks before it.
  virtual Pending reduce_scatter(const float* values, float* mine,
                                 std::span<const std::int64_t> counts) = 0;
  /// `data` of rank `root`, on every rank.
  virtual Pending broadcast(void* data, std::int64_t bytes, int root) = 0;
  /// Between two ranks: messages of one tag, from 0 to 1023, arrive in the order they were sent.
  virtual Pending send(const void* data, std::int64_t bytes, int to, int tag) = 0;
  virtual Pending receive(void* data, std::int64_t bytes, int from, int tag) = 0;
};

}  // namespace keyfold

// Who answers: this process alone, or the ranks of an MPI job, each with a share of the keys.
#pragma once

#include <exception>
#include <keyfold/context_parallel.hpp>
#include <keyfold/plan.hpp>
#include <memory>

namespace keyfold::cli {

class Team {
 public:
  virtual ~Team() = default;
  virtual int rank() const { return 0; }
  virtual int num_ranks() const { return 1; }
  /// The positions whose keys this rank holds, of so many, for calls of these two shapes.
  virtual KeySpan share(std::int64_t length, const AttentionShape& prefill,
                        const AttentionShape& decode, const AttentionOptions& options) const;
  /// Attention over the keys of all.
  virtual Report attend(const TensorView& q, const TensorView& k, const TensorView& v,
                        const MutableTensorView& out, const AttentionOptions& options);
  /// Rank 0's byte, on all ranks.
  virtual char agree(char byte) const { return byte; }
  /// Ends the call for all ranks after an error on this one. Returns where it is the only one.
  virtual void abort(const std::exception_ptr& error) const;
};

/// The ranks of the MPI job that this process is started in (by mpirun, say). Throws RunError where
/// the tool was built without MPI.
std::unique_ptr<Team> mpi_team();

}  // namespace keyfold::cli

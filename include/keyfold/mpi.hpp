// Ranks of MPI, for ContextParallel. Part of the library keyfold_mpi.
#pragma once

#include <mpi.h>

#include <memory>

#include "keyfold/context_parallel.hpp"

namespace keyfold {

/// Carries a ContextParallel's messages over a duplicate of `comm`, by MPI's own non-blocking
/// collective operations. To be called by all ranks of it, between MPI_Init and MPI_Finalize; one
/// thread at a time calls MPI (MPI_THREAD_FUNNELED is enough where that is the main thread).
///
/// An error that MPI reports is a PeerError. A rank whose process ends is found out by the timeout
/// of the calls, where MPI itself does not end all processes first, as mpirun does by default.
/// Throws PeerError when the other ranks do not join within `timeout_seconds`.
///
///   keyfold::ContextParallel ranks(keyfold::mpi_transport(MPI_COMM_WORLD));
///   ranks.scaled_dot_product_attention(q, k, v, out, options);
KEYFOLD_API std::unique_ptr<Transport> mpi_transport(MPI_Comm comm, double timeout_seconds = 300);

}  // namespace keyfold

#include "team.hpp"

#ifdef KEYFOLD_MPI
#include <fmt/format.h>

#include <keyfold/mpi.hpp>
#include <numeric>
#endif

namespace keyfold::cli {

KeySpan Team::share(std::int64_t length, const AttentionShape&, const AttentionShape&,
                    const AttentionOptions&) const {
  return {0, length};
}

Report Team::attend(const TensorView& q, const TensorView& k, const TensorView& v,
                    const MutableTensorView& out, const AttentionOptions& options) {
  return scaled_dot_product_attention(q, k, v, out, options);
}

void Team::abort(const std::exception_ptr&) const {}

#ifdef KEYFOLD_MPI
namespace {

/// MPI from here to the end of the object.
struct MpiSession {
  MpiSession() {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  }
  ~MpiSession() { MPI_Finalize(); }
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
};

class MpiTeam : public Team {
 public:
  int rank() const override { return ranks_.rank(); }
  int num_ranks() const override { return ranks_.num_ranks(); }

  KeySpan share(std::int64_t length, const AttentionShape& prefill, const AttentionShape& decode,
                const AttentionOptions& options) const override {
    const std::int64_t split_len =
        std::lcm(plan(prefill, options).split_len, plan(decode, options).split_len);
    const std::vector<KeySpan> spans = shard_keys(length, num_ranks(), rank(), split_len);
    return spans.empty() ? KeySpan{length, length} : spans.front();
  }

  Report attend(const TensorView& q, const TensorView& k, const TensorView& v,
                const MutableTensorView& out, const AttentionOptions& options) override {
    ContextParallelOptions all;
    all.attention = options;
    return ranks_.scaled_dot_product_attention(q, k, v, out, all).report;
  }

  char agree(char byte) const override {
    MPI_Bcast(&byte, 1, MPI_CHAR, 0, MPI_COMM_WORLD);
    return byte;
  }

  void abort(const std::exception_ptr& error) const override {
    std::string what = "an error";
    try {
      std::rethrow_exception(error);
    } catch (const std::exception& e) {
      what = e.what();
    }
    fmt::print(stderr, "keyfold: rank {}: {}\n", rank(), what);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }

 private:
  MpiSession mpi_;
  ContextParallel ranks_{mpi_transport(MPI_COMM_WORLD)};
};

}  // namespace

std::unique_ptr<Team> mpi_team() { return std::make_unique<MpiTeam>(); }
#else
std::unique_ptr<Team> mpi_team() {
  throw RunError(ErrorCode::kUnsupported,
                 "this keyfold was built without MPI; build it where MPI is installed "
                 "(libopenmpi-dev or libmpich-dev)");
}
#endif

}  // namespace keyfold::cli

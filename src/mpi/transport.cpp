// Transport over MPI's own non-blocking operations.
#include <chrono>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "keyfold/mpi.hpp"

namespace keyfold {
namespace {

void check(int code, const char* what) {
  if (code == MPI_SUCCESS) return;
  std::string text(MPI_MAX_ERROR_STRING, '\0');
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  text.resize(static_cast<std::size_t>(length));
  throw PeerError(std::string(what) + ": " + text, {});
}

int to_count(std::int64_t count) {
  if (count > std::numeric_limits<int>::max()) {
    throw InvalidArgument("block_bytes",
                          "expected messages of less than 2^31 elements, got one of " +
                              std::to_string(count) + "; lower block_bytes");
  }
  return static_cast<int>(count);
}

class MpiTransport : public Transport {
 public:
  MpiTransport(MPI_Comm comm, double timeout_seconds) {
    int initialized = 0, finalized = 0;
    MPI_Initialized(&initialized);
    MPI_Finalized(&finalized);
    if (initialized == 0 || finalized != 0 || comm == MPI_COMM_NULL) {
      throw InvalidArgument("comm", "expected a communicator between MPI_Init and MPI_Finalize");
    }
    MPI_Request joined = MPI_REQUEST_NULL;
    check(MPI_Comm_idup(comm, &comm_, &joined), "MPI_Comm_idup");
    const auto start = std::chrono::steady_clock::now();
    for (int done = 0; done == 0;) {
      check(MPI_Test(&joined, &done, MPI_STATUS_IGNORE), "MPI_Comm_idup");
      if (done != 0) break;
      std::this_thread::yield();
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (waited.count() > timeout_seconds) {
        throw PeerError("not all ranks joined within " + std::to_string(timeout_seconds) +
                            " s. End this process: the ranks can't work together any more",
                        {});
      }
    }
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(comm_, &num_ranks_), "MPI_Comm_size");
  }
  ~MpiTransport() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // With operations under way that never end, a communicator can't be given back.
    if (finalized == 0 && *under_way_ == 0) MPI_Comm_free(&comm_);
  }
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  Pending all_gather(const void* mine, void* all, std::int64_t bytes) override {
    const int count = to_count(bytes);
    return begin("MPI_Iallgather", [&](Operation& it) {
      return MPI_Iallgather(mine, count, MPI_BYTE, all, count, MPI_BYTE, comm_, &it.request);
    });
  }
  Pending all_reduce(float* values, std::int64_t count, Reduction reduction) override {
    const MPI_Op op = reduction == Reduction::kMax ? MPI_MAX : MPI_SUM;
    return begin("MPI_Iallreduce", [&](Operation& it) {
      return MPI_Iallreduce(MPI_IN_PLACE, values, to_count(count), MPI_FLOAT, op, comm_,
                            &it.request);
    });
  }
  Pending reduce_scatter(const float* values, float* mine,
                         std::span<const std::int64_t> counts) override {
    return begin("MPI_Ireduce_scatter", [&](Operation& it) {
      for (const std::int64_t count : counts) it.counts.push_back(to_count(count));
      return MPI_Ireduce_scatter(values, mine, it.counts.data(), MPI_FLOAT, MPI_SUM, comm_,
                                 &it.request);
    });
  }
  Pending broadcast(void* data, std::int64_t bytes, int root) override {
    return begin("MPI_Ibcast", [&](Operation& it) {
      return MPI_Ibcast(data, to_count(bytes), MPI_BYTE, root, comm_, &it.request);
    });
  }
  Pending send(const void* data, std::int64_t bytes, int to, int tag) override {
    return begin("MPI_Isend", [&](Operation& it) {
      return MPI_Isend(data, to_count(bytes), MPI_BYTE, to, tag, comm_, &it.request);
    });
  }
  Pending receive(void* data, std::int64_t bytes, int from, int tag) override {
    return begin("MPI_Irecv", [&](Operation& it) {
      return MPI_Irecv(data, to_count(bytes), MPI_BYTE, from, tag, comm_, &it.request);
    });
  }

 private:
  /// An operation under way, with what MPI reads until its end.
  class Operation : public Request {
   public:
    Operation(const char* what, std::shared_ptr<int> under_way)
        : what_(what), under_way_(std::move(under_way)) {}
    bool done() override {
      if (request == MPI_REQUEST_NULL) return true;
      int done = 0;
      check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), what_);
      if (done != 0) --*under_way_;
      return done != 0;
    }

    MPI_Request request = MPI_REQUEST_NULL;
    std::vector<int> counts;

   private:
    const char* what_;
    std::shared_ptr<int> under_way_;
  };

  template <class Begin>
  Pending begin(const char* what, const Begin& begin) {
    auto operation = std::make_unique<Operation>(what, under_way_);
    check(begin(*operation), what);
    if (operation->request != MPI_REQUEST_NULL) ++*under_way_;
    return operation;
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, num_ranks_ = 1;
  std::shared_ptr<int> under_way_ = std::make_shared<int>(0);
};

}  // namespace

std::unique_ptr<Transport> mpi_transport(MPI_Comm comm, double timeout_seconds) {
  return std::make_unique<MpiTransport>(comm, timeout_seconds);
}

}  // namespace keyfold

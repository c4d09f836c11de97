// What a call of many ranks takes, and what its messages take alone; run by ranks.py under mpirun.
// Prints one JSON document on rank 0.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "keyfold/keyfold.hpp"
#include "keyfold/mpi.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;
using Json = nlohmann::ordered_json;

struct Job {
  int rank = 0, num_ranks = 1, repetitions = 5;
};

/// Median over repetitions of the slowest rank's time, in milliseconds.
double median_ms(const Job& job, const std::function<void()>& work) {
  std::vector<double> times;
  for (int i = 0; i <= job.repetitions; ++i) {  // the first is for warming up
    MPI_Barrier(MPI_COMM_WORLD);
    const auto start = std::chrono::steady_clock::now();
    work();
    double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    MPI_Allreduce(MPI_IN_PLACE, &ms, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    if (i > 0) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// Latency and bandwidth between ranks 0 and 1, and of reductions among all.
Json measure_link(const Job& job) {
  constexpr int kSmall = 200, kBig = 10, kBytes = 4 << 20;
  std::vector<char> data(kBytes);
  const auto ping_pong = [&](int count, int bytes) {
    for (int i = 0; i < count; ++i) {
      if (job.rank == 0) {
        MPI_Send(data.data(), bytes, MPI_CHAR, 1, 0, MPI_COMM_WORLD);
        MPI_Recv(data.data(), bytes, MPI_CHAR, 1, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      } else if (job.rank == 1) {
        MPI_Recv(data.data(), bytes, MPI_CHAR, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        MPI_Send(data.data(), bytes, MPI_CHAR, 0, 0, MPI_COMM_WORLD);
      }
    }
  };
  if (job.num_ranks == 1) return nullptr;
  const double latency = median_ms(job, [&] { ping_pong(kSmall, 8); }) / (2 * kSmall);
  const double transfer = median_ms(job, [&] { ping_pong(kBig, kBytes); }) / (2 * kBig);
  std::vector<float> values(kBytes / sizeof(float));
  const auto reduce = [&](int count, int floats) {
    for (int i = 0; i < count; ++i)
      MPI_Allreduce(MPI_IN_PLACE, values.data(), floats, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  };
  return {{"latency_us", latency * 1e3},
          {"bandwidth_gb_per_s", kBytes / (transfer * 1e-3) / 1e9},
          {"all_reduce_8_bytes_us", median_ms(job, [&] { reduce(kSmall, 2); }) / kSmall * 1e3},
          {"all_reduce_4_mib_ms",
           median_ms(job, [&] { reduce(kBig, kBytes / static_cast<int>(sizeof(float))); }) / kBig}};
}

struct Shape {
  const char* name;
  DType dtype;
  std::int64_t heads, kv_heads, q_len, kv_len;
  bool causal;
};

struct Way {
  const char* name;
  Queries queries;
  MergeOrder order;
};

/// One call by the ranks together, and this rank's share of it alone.
Json measure(const Job& job, ContextParallel& ranks, const Shape& s, const Way& way) {
  constexpr std::int64_t kDim = 128;
  const bool own = way.queries == Queries::kOwn;
  const AttentionShape shape{1, s.heads, s.kv_heads, s.q_len, s.kv_len, kDim, kDim, s.dtype};
  ContextParallelOptions options;
  options.queries = way.queries;
  options.order = way.order;
  options.attention.causal = s.causal;
  options.attention.run.num_threads = 1;
  const std::int64_t split_len = plan(shape, options.attention).split_len;
  const auto count = [](const std::vector<KeySpan>& spans) {
    return std::accumulate(
        spans.begin(), spans.end(), std::int64_t{0},
        [](std::int64_t sum, const KeySpan& span) { return sum + span.end - span.begin; });
  };
  // Causal work is the same on all ranks where the keys are in stripes, or the rows.
  if (s.causal && way.order == MergeOrder::kReduce) options.stripe_len = 4 * split_len;
  if (own) options.row_stripe_len = (s.q_len + 2 * job.num_ranks - 1) / (2 * job.num_ranks);
  const std::int64_t keys =
      count(shard_keys(s.kv_len, job.num_ranks, job.rank, split_len, options.stripe_len));
  const std::int64_t rows =
      own ? count(shard_rows(s.q_len, job.num_ranks, job.rank, options.row_stripe_len)) : s.q_len;
  const cli::RandomTensor q(s.dtype, {1, s.heads, rows, kDim}, 1, 1, {});
  const cli::RandomTensor k(s.dtype, {1, s.kv_heads, keys, kDim}, 2, 1, {});
  const cli::RandomTensor v(s.dtype, {1, s.kv_heads, keys, kDim}, 3, 1, {});
  const cli::RandomTensor out(s.dtype, {1, s.heads, rows, kDim}, 4, 1, {});
  ContextParallelReport report;
  const double ms = median_ms(job, [&] {
    report = ranks.scaled_dot_product_attention(q.view(), k.view(), v.view(), out.view(), options);
  });
  return {{"call", s.name},
          {"way", way.name},
          {"ms", ms},
          {"messages", report.messages},
          {"message_bytes", report.message_bytes},
          {"waiting_ms", report.waiting_ms}};
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  Job job;
  MPI_Comm_rank(MPI_COMM_WORLD, &job.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &job.num_ranks);
  if (argc > 1) job.repetitions = std::atoi(argv[1]);
  {
    ContextParallel ranks(mpi_transport(MPI_COMM_WORLD));
    Json calls = Json::array();
    const Shape shapes[] = {
        {"decode, 131,072 keys", DType::kBFloat16, 32, 8, 1, 131072, false},
        {"decode, 8,192 keys", DType::kBFloat16, 32, 8, 1, 8192, false},
        {"prefill, 512 rows, 32,768 keys", DType::kFloat32, 8, 2, 512, 32768, true},
        {"prefill, 8,192 rows and keys", DType::kFloat32, 8, 2, 8192, 8192, true},
    };
    const Way ways[] = {
        {"reduce", Queries::kReplicated, MergeOrder::kReduce},
        {"ordered", Queries::kReplicated, MergeOrder::kOrdered},
        {"reduce, own rows", Queries::kOwn, MergeOrder::kReduce},
        {"ordered, own rows", Queries::kOwn, MergeOrder::kOrdered},
    };
    const Json link = measure_link(job);
    for (const Shape& shape : shapes) {
      for (const Way& way : ways) {
        if (shape.q_len == 1 && way.queries == Queries::kOwn) continue;
        calls.push_back(measure(job, ranks, shape, way));
      }
    }
    if (job.rank == 0)
      fmt::print("{}\n", Json{{"ranks", job.num_ranks}, {"link", link}, {"calls", calls}}.dump());
  }
  MPI_Finalize();
}

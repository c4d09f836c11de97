// Prefill and decode beside ggml and beside the machine's limits, in one interleaved run:
//   attention_benchmark --benchmark_repetitions=7 --benchmark_enable_random_interleaving=true
#include <benchmark/benchmark.h>

#include <cstdint>
#include <map>
#include <string>
#include <thread>

#include "ceilings.hpp"
#include "keyfold/attention.hpp"
#include "peer.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;

struct Shape {
  const char* name;
  std::int64_t num_heads, num_kv_heads, q_len, kv_len, head_dim;
};
constexpr Shape kShapes[] = {{"prefill", 8, 2, 512, 32768, 128}, {"decode", 32, 8, 1, 65536, 128}};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

int num_threads() { return static_cast<int>(std::thread::hardware_concurrency()); }

const cli::Ceilings& ceilings() {
  static const cli::Ceilings measured = cli::measure_ceilings(num_threads(), [] {});
  return measured;
}

struct Data {
  Data(const Shape& s, DType dtype)
      : q(dtype, {1, s.num_heads, s.q_len, s.head_dim}, 1, num_threads(), {}),
        k(dtype, {1, s.num_kv_heads, s.kv_len, s.head_dim}, 2, num_threads(), {}),
        v(dtype, {1, s.num_kv_heads, s.kv_len, s.head_dim}, 3, num_threads(), {}),
        out(dtype, q.view().sizes, 4, num_threads(), {}) {}
  cli::RandomTensor q, k, v, out;
};

/// Made when a benchmark first needs it and kept for all of its repetitions.
Data& data(const Shape& shape, DType dtype) {
  static std::map<std::pair<std::string, DType>, Data> all;
  return all.try_emplace({shape.name, dtype}, shape, dtype).first->second;
}

void count(benchmark::State& state, const Shape& s, DType dtype) {
  using Counter = benchmark::Counter;
  const double runs = static_cast<double>(state.iterations());
  const double flops = 4.0 * static_cast<double>(s.num_heads * s.q_len * s.kv_len * s.head_dim);
  const double bytes =
      2.0 * static_cast<double>(s.num_kv_heads * s.kv_len * s.head_dim * size_of(dtype));
  state.counters["GFLOP/s"] = Counter(runs * flops / 1e9, Counter::kIsRate);
  state.counters["GB/s"] = Counter(runs * bytes / 1e9, Counter::kIsRate);
  state.counters["of_FMA_peak"] =
      Counter(runs * flops / 1e9 / ceilings().fma_gflops, Counter::kIsRate);
  state.counters["of_read_GB/s"] =
      Counter(runs * bytes / 1e9 / ceilings().read_gbs, Counter::kIsRate);
}

void run_keyfold(benchmark::State& state, const Shape& shape, DType dtype) {
  Data& d = data(shape, dtype);
  for (auto _ : state) {
    scaled_dot_product_attention(d.q.view(), d.k.view(), d.v.view(), d.out.view());
  }
  count(state, shape, dtype);
}

void run_peer(benchmark::State& state, const Shape& shape, DType dtype) {
  Data& d = data(shape, dtype);
  const auto peer = benchmarks::make_peer(d.q.view(), d.k.view(), d.v.view(), num_threads());
  if (!peer) {
    state.SkipWithError("built without ggml");
    return;
  }
  for (auto _ : state) peer->run();
  count(state, shape, dtype);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Shape& shape : kShapes) {
    for (const DType dtype : kDTypes) {
      const std::string name = std::string(shape.name) + "/" + std::string(name_of(dtype)) + "/";
      for (const auto& [who, run] :
           {std::pair{"keyfold", &run_keyfold}, std::pair{"ggml", &run_peer}}) {
        benchmark::RegisterBenchmark((name + who).c_str(), run, shape, dtype)
            ->Unit(benchmark::kMillisecond)
            ->UseRealTime();
      }
    }
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("FMA peak, GFLOP/s", std::to_string(ceilings().fma_gflops));
  benchmark::AddCustomContext("read bandwidth, GB/s", std::to_string(ceilings().read_gbs));
  benchmark::AddCustomContext("threads", std::to_string(num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

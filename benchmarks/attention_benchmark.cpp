// keyfold beside ggml in one interleaved run, for the calls that the arguments name:
//   attention_benchmark --benchmark_repetitions=7 --benchmark_enable_random_interleaving=true
//     8/2/512/32768/128/bfloat16
// which is heads / key heads / q_len / kv_len / head_dim / dtype.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "keyfold/attention.hpp"
#include "peer.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;

struct Shape {
  std::int64_t num_heads, num_kv_heads, q_len, kv_len, head_dim;
  DType dtype;
};

std::optional<Shape> parse(const char* text) {
  std::array<long, 5> n{};
  std::array<char, 16> name{};
  const int found = std::sscanf(text, "%ld/%ld/%ld/%ld/%ld/%15s", n.data(), &n[1], &n[2], &n[3],
                                &n[4], name.data());
  if (found != 6) return {};
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    if (name_of(dtype) == name.data()) return Shape{n[0], n[1], n[2], n[3], n[4], dtype};
  return {};
}

/// As keyfold has it.
int num_threads() {
  const char* wanted = std::getenv("KEYFOLD_NUM_THREADS");
  return wanted ? std::atoi(wanted) : static_cast<int>(std::thread::hardware_concurrency());
}

struct Data {
  explicit Data(const Shape& s)
      : q(s.dtype, {1, s.num_heads, s.q_len, s.head_dim}, 1, num_threads(), {}),
        k(s.dtype, {1, s.num_kv_heads, s.kv_len, s.head_dim}, 2, num_threads(), {}),
        v(s.dtype, {1, s.num_kv_heads, s.kv_len, s.head_dim}, 3, num_threads(), {}),
        out(s.dtype, q.view().sizes, 4, num_threads(), {}) {}
  cli::RandomTensor q, k, v, out;
};

/// Made when a benchmark first needs it and kept for all of its repetitions.
Data& data(const std::string& name, const Shape& shape) {
  static std::map<std::string, Data> all;
  return all.try_emplace(name, shape).first->second;
}

void count(benchmark::State& state, const Shape& s) {
  using Counter = benchmark::Counter;
  const double runs = static_cast<double>(state.iterations());
  const double flops = 4.0 * static_cast<double>(s.num_heads * s.q_len * s.kv_len * s.head_dim);
  const double bytes =
      2.0 * static_cast<double>(s.num_kv_heads * s.kv_len * s.head_dim * size_of(s.dtype));
  state.counters["GFLOP/s"] = Counter(runs * flops / 1e9, Counter::kIsRate);
  state.counters["GB/s"] = Counter(runs * bytes / 1e9, Counter::kIsRate);
}

void run_keyfold(benchmark::State& state, const std::string& name, const Shape& shape) {
  Data& d = data(name, shape);
  for (auto _ : state) {
    scaled_dot_product_attention(d.q.view(), d.k.view(), d.v.view(), d.out.view());
  }
  count(state, shape);
}

void run_peer(benchmark::State& state, const std::string& name, const Shape& shape) {
  Data& d = data(name, shape);
  const auto peer = benchmarks::make_peer(d.q.view(), d.k.view(), d.v.view(), num_threads());
  if (!peer) {
    state.SkipWithError("built without ggml");
    return;
  }
  for (auto _ : state) peer->run();
  count(state, shape);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    for (const char* dtype : {"float32", "float16", "bfloat16"}) {
      names.push_back(fmt::format("8/2/512/32768/128/{}", dtype));
      names.push_back(fmt::format("32/8/1/65536/128/{}", dtype));
    }
  }
  for (const std::string& name : names) {
    const std::optional<Shape> shape = parse(name.c_str());
    if (!shape) {
      fmt::print(stderr, "expected heads/kv_heads/q_len/kv_len/head_dim/dtype, got '{}'\n", name);
      return 2;
    }
    for (const auto& [who, run] :
         {std::pair{"keyfold", &run_keyfold}, std::pair{"ggml", &run_peer}}) {
      benchmark::RegisterBenchmark((name + "/" + who).c_str(), run, name, *shape)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();
    }
  }
  benchmark::AddCustomContext("threads", std::to_string(num_threads()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

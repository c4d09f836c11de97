// Each step of the CPU kernels by itself, on one thread and one tile of query rows against one
// split, over and over: keys and values as the caches hold them. `each` is the time of a score, of
// which a tile has rows times keys; of packing it is the time of a key.
//   KEYFOLD_CPU_ISA=avx2 kernel_benchmark --benchmark_filter=/128/
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <string>

#include "ceilings.hpp"
#include "cpu/workspace.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;
using namespace keyfold::cpu;

core::Problem problem_of(DType dtype, std::int64_t dim) {
  core::Problem problem;
  problem.shape = {.batch = 1,
                   .num_heads = 1,
                   .num_kv_heads = 1,
                   .q_len = 512,  // the kernels of prefill
                   .kv_len = kSplitLen,
                   .head_dim = dim,
                   .value_dim = dim,
                   .dtype = dtype};
  return problem;
}

/// A tile whose scores, weights and output can be computed again and again.
class Step {
 public:
  Step(DType dtype, std::int64_t dim)
      : kernels(selected_kernels(dtype, 512)),
        dtype_(dtype),
        dim_(dim),
        rows_(dtype, {1, 1, kSplitLen, dim}, 1, 1, {}),
        workspace_(Layout(problem_of(dtype, dim), kernels), kernels.row_tile, 1),
        space_(workspace_.thread(0)),
        result_(space_.result.at(0)) {
    const Layout& layout = workspace_.layout();
    tile_.num_rows = layout.row_tile;
    tile_.q = space_.q;
    tile_.words = layout.words;
    tile_.padded_value_dim = layout.padded_value_dim;
    tile_.scale = 1.0f / static_cast<float>(dim);
    tile_.scores = space_.scores;
    for (std::int64_t r = 0; r < tile_.num_rows; ++r) {
      tile_.see(r, 0, kSplitLen, panels_of(0, kSplitLen));
      kernels.pack_q(source(r), space_.q + r * kMaxDim);
    }
    pack_keys(), pack_values(), score(), softmax(), weigh();
    merge();
  }

  void pack_keys() {
    for (std::int64_t key = 0; key < kSplitLen; key += kPanel)
      kernels.pack_k(source(key), kPanel, workspace_.packed(0, kSplitLen).k + key * tile_.words);
  }
  void pack_values() {
    for (std::int64_t key = 0; key < kSplitLen; key += kPanel)
      kernels.pack_v(source(key), kPanel, tile_.padded_value_dim,
                     workspace_.packed(0, kSplitLen).v + key * tile_.padded_value_dim);
  }
  void score() { kernels.score(tile_, dtype_, workspace_.packed(0, kSplitLen).k, 0, kSplitLen); }
  /// Of weights after the first time, which costs the same.
  void softmax() { kernels.softmax(tile_, result_); }
  void weigh() { kernels.weigh(tile_, workspace_.packed(0, kSplitLen).v, 0, kSplitLen, result_); }
  void merge() {
    kernels.merge(workspace_.states().at(0), result_, tile_.padded_value_dim, tile_.num_rows);
  }

  double scores() const { return static_cast<double>(tile_.num_rows * kSplitLen); }
  double flops() const { return 2 * scores() * static_cast<double>(dim_); }

  const Kernels& kernels;

 private:
  RowSource source(std::int64_t row) const {
    const auto size = static_cast<std::int64_t>(size_of(dtype_));
    return {static_cast<const std::byte*>(rows_.view().data) + row * dim_ * size, dtype_,
            dim_ * size, size, dim_};
  }

  DType dtype_;
  std::int64_t dim_;
  cli::RandomTensor rows_;
  Workspace workspace_;
  ThreadSpace space_;
  RowState result_;
  Tile tile_;
};

struct Kind {
  const char* name;
  void (Step::*run)();
  bool flops, keys;
};
constexpr Kind kKinds[] = {
    {"pack_k", &Step::pack_keys, false, true}, {"pack_v", &Step::pack_values, false, true},
    {"score", &Step::score, true, false},      {"softmax", &Step::softmax, false, false},
    {"weigh", &Step::weigh, true, false},      {"merge", &Step::merge, false, false}};

void run(benchmark::State& state, DType dtype, std::int64_t dim, Kind kind) {
  Step step(dtype, dim);
  for (auto _ : state) {
    (step.*kind.run)();
    benchmark::ClobberMemory();
  }
  using Counter = benchmark::Counter;
  const double runs = static_cast<double>(state.iterations());
  const double of = kind.keys ? static_cast<double>(kSplitLen) : step.scores();
  state.counters["each"] = Counter(runs * of, Counter::kIsRate | Counter::kInvert);
  if (kind.flops) state.counters["GFLOP/s"] = Counter(runs * step.flops() / 1e9, Counter::kIsRate);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const std::int64_t dim : {64, 128, 256})
      for (const Kind& kind : kKinds)
        benchmark::RegisterBenchmark(
            fmt::format("{}/{}/{}", name_of(dtype), dim, kind.name).c_str(), run, dtype, dim, kind);
  const cli::Ceilings ceilings = cli::measure_ceilings(1, [] {});
  benchmark::AddCustomContext("kernels", selected_kernels(DType::kBFloat16, 512).name);
  benchmark::AddCustomContext("float32 multiply-adds, GFLOP/s",
                              fmt::format("{:.0f}", ceilings.fma_gflops));
  benchmark::AddCustomContext("bfloat16 pairs, GFLOP/s",
                              fmt::format("{:.0f}", ceilings.bfloat16_gflops));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

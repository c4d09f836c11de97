// Peak memory of a long prefill step beyond its inputs and output, which are in memory before:
// q_len 2048, 32/8 heads, head_dim 128, float16. Arguments: kv_len...
#include <fmt/format.h>

#include <cstdlib>
#include <thread>
#include <vector>

#include "keyfold/attention.hpp"
#include "memory.hpp"
#include "random_tensor.hpp"

int main(int argc, char** argv) {
  using namespace keyfold;
  std::vector<std::int64_t> lengths;
  for (int i = 1; i < argc; ++i) lengths.push_back(std::atoll(argv[i]));
  if (lengths.empty()) lengths = {131072, 1048576};
  constexpr double kMiB = 1 << 20;
  constexpr DType kType = DType::kFloat16;
  const int threads = static_cast<int>(std::thread::hardware_concurrency());
  fmt::print("{:>9} {:>12} {:>12} {:>16} {:>11} {:>10}\n", "keys", "k and v, MiB", "scratch, MiB",
             "peak growth, MiB", "dispatches", "seconds");
  for (const std::int64_t kv_len : lengths) {
    const cli::RandomTensor q(kType, {1, 32, 2048, 128}, 1, threads, {});
    const cli::RandomTensor k(kType, {1, 8, kv_len, 128}, 2, threads, {});
    const cli::RandomTensor v(kType, {1, 8, kv_len, 128}, 3, threads, {});
    const cli::RandomTensor out(kType, {1, 32, 2048, 128}, 4, threads, {});
    cli::reset_peak_memory();
    const std::int64_t before = cli::peak_memory();
    const Report report = scaled_dot_product_attention(q.view(), k.view(), v.view(), out.view());
    fmt::print("{:>9} {:>12.0f} {:>12.1f} {:>16.1f} {:>11} {:>10.1f}\n", kv_len,
               2.0 * 8 * 128 * 2 * static_cast<double>(kv_len) / kMiB,
               static_cast<double>(report.scratch_bytes) / kMiB,
               static_cast<double>(cli::peak_memory() - before) / kMiB, report.dispatches,
               report.elapsed_ms / 1e3);
  }
}

// The error of decoding against float64 as keys grow: relative L2 over all heads of one token, for
// keyfold, the naive computation in the same dtype, and ggml. Arguments: kv_len...
#include <fmt/format.h>

#include <cmath>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/half.hpp"
#include "keyfold/attention.hpp"
#include "peer.hpp"
#include "random_tensor.hpp"
#include "support/reference.hpp"

namespace {

using namespace keyfold;

double relative_error(const std::vector<double>& expected, const std::vector<double>& got) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    error += (expected[i] - got[i]) * (expected[i] - got[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

void measure(DType dtype, std::int64_t kv_len) {
  constexpr std::int64_t kHeads = 4, kDim = 128;
  const int threads = static_cast<int>(std::thread::hardware_concurrency());
  const cli::RandomTensor q(dtype, {1, kHeads, 1, kDim}, 1, threads, {});
  const cli::RandomTensor k(dtype, {1, 1, kv_len, kDim}, 2, threads, {});
  const cli::RandomTensor v(dtype, {1, 1, kv_len, kDim}, 3, threads, {});
  const cli::RandomTensor out(dtype, {1, kHeads, 1, kDim}, 4, threads, {});
  const auto rows = test::all_rows(q.view());
  const auto expected = test::reference(q.view(), k.view(), v.view(), {}, rows).out;
  const auto naive = test::naive(q.view(), k.view(), v.view(), {}, rows).out;

  scaled_dot_product_attention(q.view(), k.view(), v.view(), out.view());
  std::vector<double> ours;
  for (std::int64_t h = 0; h < kHeads; ++h) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      ours.push_back(core::load_float(core::element(out.view(), 0, h, 0, d), dtype));
    }
  }
  std::string peer_error = "-";
  if (const auto peer = benchmarks::make_peer(q.view(), k.view(), v.view(), threads)) {
    peer->run();
    const std::vector<double> theirs(peer->out(), peer->out() + kHeads * kDim);
    peer_error = fmt::format("{:.2e}", relative_error(expected, theirs));
  }
  fmt::print("{:>9} {:>9} {:>10.2e} {:>10.2e} {:>10}\n", name_of(dtype), kv_len,
             relative_error(expected, ours), relative_error(expected, naive), peer_error);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::int64_t> lengths;
  for (int i = 1; i < argc; ++i) lengths.push_back(std::atoll(argv[i]));
  if (lengths.empty()) lengths = {8192, 262144, 1048576};
  fmt::print("{:>9} {:>9} {:>10} {:>10} {:>10}\n", "dtype", "keys", "keyfold", "naive", "ggml");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (const std::int64_t kv_len : lengths) measure(dtype, kv_len);
  }
}

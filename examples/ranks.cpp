// Keys spread over the ranks of an MPI job: each makes its own, and all get the bits of one
// process.
//   mpirun -n 4 example_ranks
#include <cstring>
#include <iostream>
#include <keyfold/keyfold.hpp>
#include <keyfold/mpi.hpp>
#include <vector>

namespace {

constexpr std::int64_t kKeys = 100'000, kDim = 64;
constexpr auto kDType = keyfold::DType::kFloat32;

// Keys [begin, end), which any rank can make: a file's part, in real life.
std::vector<float> make_keys(keyfold::KeySpan keys) {
  std::vector<float> values((keys.end - keys.begin) * kDim);
  std::uint64_t state = keys.begin * kDim;
  for (float& value : values) {
    std::uint64_t x = ++state * 0x9e3779b97f4a7c15;
    value = float((x ^ (x >> 31)) % 2001) / 1000.0f - 1.0f;
  }
  return values;
}

keyfold::TensorView view(const std::vector<float>& values) {
  return {values.data(), kDType, {1, 1, std::int64_t(values.size()) / kDim, kDim}};
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int code = 0;
  {
    keyfold::ContextParallel ranks(keyfold::mpi_transport(MPI_COMM_WORLD));
    const std::vector<float> q = make_keys({7, 8});
    const keyfold::AttentionShape shape{1, 1, 1, 1, kKeys, kDim, kDim, kDType};
    const std::int64_t split_len = keyfold::plan(shape).split_len;
    std::vector<float> mine;
    for (const keyfold::KeySpan& span :
         keyfold::shard_keys(kKeys, ranks.num_ranks(), ranks.rank(), split_len)) {
      mine = make_keys(span);
    }

    keyfold::ContextParallelOptions options;
    options.order = keyfold::MergeOrder::kOrdered;
    std::vector<float> out(kDim), one(kDim);
    const auto target = [](std::vector<float>& values) {
      return keyfold::MutableTensorView(values.data(), kDType, {1, 1, 1, kDim});
    };
    ranks.scaled_dot_product_attention(view(q), view(mine), view(mine), target(out), options);

    const std::vector<float> all = make_keys({0, kKeys});
    keyfold::scaled_dot_product_attention(view(q), view(all), view(all), target(one));
    const bool same = std::memcmp(out.data(), one.data(), kDim * sizeof(float)) == 0;
    std::cout << "rank " << ranks.rank() << " of " << ranks.num_ranks() << ", "
              << mine.size() / kDim
              << " keys: " << (same ? "the bits of one process" : "NOT the bits of one process")
              << '\n';
    code = same ? 0 : 1;
  }
  MPI_Finalize();
  return code;
}

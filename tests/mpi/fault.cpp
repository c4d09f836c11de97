// fault hang|die|wrong: one of the ranks hangs, dies or fails in the middle of a call; the others
// say so and end. Exits with 0 only where a rank has got what it should.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <keyfold/mpi.hpp>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::int64_t kHeads = 2, kRows = 64, kKeys = 4096, kDim = 64;
constexpr int kFaulty = 1;

std::vector<float> random_values(std::size_t count) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool ordered = argc > 2 && std::string(argv[2]) == "ordered";
  MPI_Init(&argc, &argv);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  keyfold::ContextParallel ranks(keyfold::mpi_transport(MPI_COMM_WORLD));

  const keyfold::Dims q_sizes{1, kHeads, kRows, kDim}, k_sizes{1, kHeads, kKeys, kDim};
  const std::vector<float> q = random_values(kHeads * kRows * kDim);
  const std::vector<float> k = random_values(kHeads * kKeys * kDim);
  std::vector<float> out(q.size(), 5.0f);
  keyfold::ContextParallelOptions options;
  options.timeout_seconds = 2;
  options.block_bytes = 20'000;
  if (ordered) options.order = keyfold::MergeOrder::kOrdered;
  int dispatches = 0;
  options.attention.run.num_threads = 1;
  options.attention.run.progress = [&](const keyfold::Progress&) {
    if (rank != kFaulty || ++dispatches != 2) return;
    if (mode == "hang") {
      // The others give up; what they leave behind must not keep this one for ever either.
      std::this_thread::sleep_for(std::chrono::seconds(8));
      std::_Exit(0);
    }
    if (mode == "die") std::raise(SIGKILL);
    if (mode == "wrong") throw std::runtime_error("out of luck");
  };
  // In one piece, or the launcher mixes it with what others say.
  const auto say = [rank](const std::string& what) {
    std::cout << "rank " + std::to_string(rank) + ": " + what + '\n' << std::flush;
  };
  const auto view = [](const std::vector<float>& values, const keyfold::Dims& sizes) {
    return keyfold::TensorView(values.data(), keyfold::DType::kFloat32, sizes);
  };
  try {
    ranks.scaled_dot_product_attention(view(q, q_sizes), view(k, k_sizes), view(k, k_sizes),
                                       {out.data(), keyfold::DType::kFloat32, q_sizes}, options);
    say("no error");
    return 1;
  } catch (const keyfold::PeerError& error) {
    say(std::string("PeerError: ") + error.std::runtime_error::what());
    if (error.ranks() != std::vector{kFaulty}) return 1;
  } catch (const std::exception& error) {
    say(error.what());
    if (rank != kFaulty) return 1;
  }
  for (const float value : out) {
    if (value != 5.0f) return 1;
  }
  if (mode == "wrong") {
    MPI_Finalize();
    return 0;
  }
  // MPI_Finalize would wait for the rank that is gone; and a launcher may end the others as soon as
  // one has ended without it.
  std::this_thread::sleep_for(std::chrono::seconds(2));
  std::_Exit(0);
}

// Keys that arrive in pieces of any size: AttentionState gives the same bits as the one call.
#include <algorithm>
#include <cstring>
#include <iostream>
#include <keyfold/keyfold.hpp>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kQLen = 3, kKvLen = 20'000, kDim = 80;
constexpr auto kDType = keyfold::DType::kFloat32;
constexpr keyfold::Dims kQSizes = {1, kHeads, kQLen, kDim}, kKvSizes = {1, kKvHeads, kKvLen, kDim};

std::vector<float> random_values(std::int64_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(rng);
  return values;
}

// Keys [begin, begin + count) of a whole tensor.
keyfold::TensorView slice(const std::vector<float>& whole, std::int64_t begin, std::int64_t count) {
  return {whole.data() + begin * kDim,
          kDType,
          {1, kKvHeads, count, kDim},
          keyfold::dense_strides(kKvSizes)};
}

}  // namespace

int main() {
  std::mt19937 rng(std::random_device{}());
  const auto q = random_values(kHeads * kQLen * kDim, rng);
  const auto k = random_values(kKvHeads * kKvLen * kDim, rng);
  const auto v = random_values(kKvHeads * kKvLen * kDim, rng);
  std::vector<float> at_once(q.size()), in_pieces(q.size());

  // The last queries of a sequence, causal. A state cannot know kv_len, so their position is given.
  keyfold::AttentionOptions options;
  options.causal = true;
  options.q_offset = kKvLen - kQLen;

  const keyfold::TensorView query(q.data(), kDType, kQSizes);
  keyfold::scaled_dot_product_attention(query, slice(k, 0, kKvLen), slice(v, 0, kKvLen),
                                        {at_once.data(), kDType, kQSizes}, options);

  keyfold::AttentionState state(query, options);
  std::uniform_int_distribution<std::int64_t> piece(1, 3000);
  int pieces = 0;
  for (; state.next_key() < kKvLen; ++pieces) {
    const std::int64_t begin = state.next_key(), count = std::min(piece(rng), kKvLen - begin);
    state.update(slice(k, begin, count), slice(v, begin, count));
  }
  state.finish({in_pieces.data(), kDType, kQSizes});

  const bool same = std::memcmp(at_once.data(), in_pieces.data(), q.size() * sizeof(float)) == 0;
  std::cout << kKvLen << " keys in " << pieces
            << " pieces: " << (same ? "the same bits as in one call" : "NOT the bits of one call")
            << '\n';
  return same ? 0 : 1;
}

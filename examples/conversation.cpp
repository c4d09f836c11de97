// A conversation whose keys outlive the process: yesterday's prefix serves today's question.
#include <cmath>
#include <cstdio>
#include <iostream>
#include <keyfold/keyfold.hpp>
#include <keyfold/kv_store.hpp>
#include <vector>

namespace {

constexpr std::int64_t kDim = 64;
constexpr auto kF32 = keyfold::DType::kFloat32;

// Appends keys [first, first + count), as a model would compute them; the values are positions.
void append(keyfold::KvStore& store, std::int64_t first, std::int64_t count) {
  std::vector<float> k(count * kDim), v(count * kDim);
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      k[j * kDim + d] = first + j == 12'345 ? 8.0f : std::sin(float(first + j + d));
      v[j * kDim + d] = float(first + j);
    }
  }
  store.append({k.data(), kF32, {1, 1, count, kDim}}, {v.data(), kF32, {1, 1, count, kDim}});
}

}  // namespace

int main() {
  const std::string path = "conversation.kv";
  std::remove(path.c_str());
  {
    auto store = keyfold::KvStore::create(path, {1, 1, kDim, kDim, kF32});
    append(store, 0, 50'000);  // yesterday
    store.close();
  }
  auto store = keyfold::KvStore::append_to(path);  // today, in milliseconds
  append(store, store.size(), 10);
  std::vector<float> q(kDim, 1.0f), out(kDim);
  const auto source = store.source();
  keyfold::scaled_dot_product_attention({q.data(), kF32, {1, 1, 1, kDim}}, *source,
                                        {out.data(), kF32, {1, 1, 1, kDim}});
  std::cout << "found key " << out[0] << " of " << store.size() << "\n";
  std::remove(path.c_str());
  return std::abs(out[0] - 12'345) < 1 ? 0 : 1;
}

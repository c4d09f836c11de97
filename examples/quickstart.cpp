// One query attends to 100,000 keys: key 54321 resembles the query, so its value comes back.
#include <cmath>
#include <iostream>
#include <keyfold/keyfold.hpp>
#include <vector>

int main() {
  constexpr std::int64_t kDim = 64, kKeys = 100'000, kNeedle = 54'321;
  std::vector<float> q(kDim, 1.0f), k(kKeys * kDim), v(kKeys * kDim), out(kDim);
  for (std::int64_t j = 0; j < kKeys; ++j) {
    for (std::int64_t d = 0; d < kDim; ++d) {
      k[j * kDim + d] = j == kNeedle ? 8.0f : std::sin(float(j + d));
      v[j * kDim + d] = float(j);
    }
  }

  const auto f32 = keyfold::DType::kFloat32;
  const keyfold::Dims kv_sizes = {1, 1, kKeys, kDim};  // [batch, heads, len, dim]
  keyfold::AttentionOptions options;
  options.run.budget_ms = 8;  // dispatches aim to stay below 8 ms
  const keyfold::Report report = keyfold::scaled_dot_product_attention(
      {q.data(), f32, {1, 1, 1, kDim}}, {k.data(), f32, kv_sizes}, {v.data(), f32, kv_sizes},
      {out.data(), f32, {1, 1, 1, kDim}}, options);

  std::cout << "found key " << out[0] << " in " << report.dispatches << " dispatches, the longest "
            << report.longest_dispatch_ms << " ms\n";
  return std::abs(out[0] - float(kNeedle)) < 1 ? 0 : 1;
}

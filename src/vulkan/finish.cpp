// Division by l, sinks, the cast to the dtype.
#include "vulkan/finish.hpp"

#include <tbb/parallel_for.h>

#include <cmath>
#include <limits>

#include "core/half.hpp"

namespace keyfold::vulkan {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// What every element of o is multiplied with and divided by, and the row's lse.
struct Norm {
  float factor = 1, divisor = 1, lse = kNothing;
};

Norm norm_of(float m, float l, std::optional<float> sink) {
  if (m == kNothing && l == 0) return {0, 1, sink.value_or(kNothing)};
  if (!sink) return {1, l, m + std::log(l)};
  const float top = std::max(m, *sink);
  const float factor = std::exp(m - top);
  const float sum = l * factor + std::exp(*sink - top);
  return {factor, sum, top + std::log(sum)};
}

}  // namespace

void write_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  const std::int64_t heads = problem.group_size(), kv_heads = problem.shape.num_kv_heads;
  const std::int64_t indices = (block.row_end - block.row_begin) * heads;
  const std::int64_t rows = (block.group_end - block.group_begin) * indices;
  tbb::parallel_for(std::int64_t{0}, rows, [&](std::int64_t i) {
    const std::int64_t group = block.group_begin + i / indices, index = i % indices;
    const std::int64_t batch = group / kv_heads, head = group % kv_heads * heads + index % heads;
    const std::int64_t row = block.row_begin + index / heads;
    const auto at = static_cast<std::size_t>(i);
    std::optional<float> sink;
    if (!problem.sinks.empty()) sink = problem.sinks[static_cast<std::size_t>(head)];
    const Norm norm = norm_of(state.ml[2 * at], state.ml[2 * at + 1], sink);
    const float* o = &state.o[at * static_cast<std::size_t>(state.padded_value_dim)];
    for (std::int64_t d = 0; d < problem.shape.value_dim; ++d) {
      // A factor of 0 leaves even Inf out; + 0 turns -0 into +0.
      const float value = norm.factor == 0 ? 0.0f : norm.factor * o[d] / norm.divisor + 0.0f;
      core::store_float(core::element(out, batch, head, row, d), out.dtype, value);
    }
    if (lse) core::store_float(core::element(*lse, batch, head, row, 0), lse->dtype, norm.lse);
  });
}

}  // namespace keyfold::vulkan

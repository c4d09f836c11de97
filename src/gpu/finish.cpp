// Division by l, sinks, the cast to the dtype.
#include "gpu/finish.hpp"

#include <tbb/parallel_for.h>

#include "core/half.hpp"
#include "core/normalise.hpp"

namespace keyfold::gpu {

void write_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse,
                bool finished) {
  const std::int64_t heads = problem.group_size(), kv_heads = problem.shape.num_kv_heads;
  const std::int64_t indices = (block.row_end - block.row_begin) * heads;
  const std::int64_t rows = (block.group_end - block.group_begin) * indices;
  tbb::parallel_for(std::int64_t{0}, rows, [&](std::int64_t i) {
    const std::int64_t group = block.group_begin + i / indices, index = i % indices;
    const std::int64_t batch = group / kv_heads, head = group % kv_heads * heads + index % heads;
    const std::int64_t row = block.row_begin + index / heads;
    std::optional<float> sink;
    if (!problem.sinks.empty()) sink = problem.sinks[static_cast<std::size_t>(head)];
    const core::RowEnd end = finished ? core::RowEnd{1, 1, state.ml[2 * i]}
                                      : core::end_row(state.ml[2 * i], state.ml[2 * i + 1], sink);
    const float* o = &state.o[i * state.padded_value_dim];
    for (std::int64_t d = 0; d < problem.shape.value_dim; ++d) {
      core::store_float(core::element(out, batch, head, row, d), out.dtype,
                        core::normalised(end, o[d]));
    }
    if (lse) core::store_float(core::element(*lse, batch, head, row, 0), lse->dtype, end.lse);
  });
}

}  // namespace keyfold::gpu

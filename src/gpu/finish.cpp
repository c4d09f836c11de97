// Division by l, sinks, the cast to the dtype; and copies.
#include "gpu/finish.hpp"

#include <tbb/parallel_for.h>

#include "core/half.hpp"
#include "core/normalise.hpp"
#include "core/saved_row.hpp"

namespace keyfold::gpu {

namespace {

/// Calls body(i, index) for the i-th state of the block, on all threads.
template <class Body>
void for_each_state(const core::Problem& problem, const core::Block& block, const Body& body) {
  const std::int64_t heads = problem.group_size(), kv_heads = problem.shape.num_kv_heads;
  const std::int64_t indices = (block.row_end - block.row_begin) * heads;
  const std::int64_t states = (block.group_end - block.group_begin) * indices;
  tbb::parallel_for(std::int64_t{0}, states, [&](std::int64_t i) {
    const std::int64_t group = block.group_begin + i / indices, index = i % indices;
    body(i, core::RowIndex{group / kv_heads, group % kv_heads * heads + index % heads,
                           block.row_begin + index / heads});
  });
}

}  // namespace

void save_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
               const StateView& to) {
  for_each_state(problem, block, [&](std::int64_t i, const core::RowIndex& row) {
    core::save_row(to, row, state.ml[2 * i], state.ml[2 * i + 1],
                   &state.o[i * state.padded_value_dim]);
  });
}

HostState load_rows(const core::Problem& problem, const core::Block& block, const StateView& from,
                    std::int64_t padded_value_dim) {
  const std::int64_t states = (block.group_end - block.group_begin) *
                              (block.row_end - block.row_begin) * problem.group_size();
  const std::int64_t o = states * padded_value_dim;
  // Zeroed: what pads o is summed and never written.
  HostState state{std::make_unique<float[]>(static_cast<std::size_t>(o + 2 * states)), nullptr,
                  padded_value_dim};
  float* const ml = state.o.get() + o;
  state.ml = ml;
  for_each_state(problem, block, [&](std::int64_t i, const core::RowIndex& row) {
    core::load_row(from, row, ml[2 * i], ml[2 * i + 1], &state.o[i * padded_value_dim]);
  });
  return state;
}

void write_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse,
                bool finished) {
  for_each_state(problem, block, [&](std::int64_t i, const core::RowIndex& at) {
    std::optional<float> sink;
    if (!problem.sinks.empty()) sink = problem.sinks[static_cast<std::size_t>(at.head)];
    const core::RowEnd end = finished ? core::RowEnd{1, 1, state.ml[2 * i]}
                                      : core::end_row(state.ml[2 * i], state.ml[2 * i + 1], sink);
    const float* o = &state.o[i * state.padded_value_dim];
    for (std::int64_t d = 0; d < problem.shape.value_dim; ++d) {
      core::store_float(core::element(out, at.batch, at.head, at.row, d), out.dtype,
                        core::normalised(end, o[d]));
    }
    if (lse)
      core::store_float(core::element(*lse, at.batch, at.head, at.row, 0), lse->dtype, end.lse);
  });
}

}  // namespace keyfold::gpu

// The fixture of tests that feed an AttentionState with the keys of a call.
#pragma once

#include <utility>

#include "support/backends.hpp"

namespace keyfold::test {

class StateTest : public BackendTest {
 protected:
  AttentionOptions options_of(const Call& call) const {
    AttentionOptions options = call.options;
    options.run.backend = GetParam();
    return options;
  }
  static void feed(AttentionState& state, const Call& call, std::int64_t begin, std::int64_t end) {
    state.update(slice(call.k, 2, begin, end), slice(call.v, 2, begin, end));
  }
  static Outputs finish(AttentionState& state, const Call& call, Layout layout = Layout::kDense) {
    const Dims sizes = call.out_sizes();
    Outputs got{Tensor(call.q.dtype, sizes, layout),
                Tensor(DType::kFloat32, {sizes[0], sizes[1], sizes[2], 1}, layout),
                {}};
    got.out.poison();
    got.lse.poison();
    got.report = state.finish(got.out.mutable_view(), got.lse.mutable_view());
    return got;
  }
  /// A call whose queries' position is explicit, as a stream needs it.
  static Call positioned(Call call) {
    if (call.options.kv_lens.empty())
      call.options.q_offset = call.options.q_offset.value_or(call.k.sizes[2] - call.q.sizes[2]);
    return call;
  }
};

}  // namespace keyfold::test

// A run's state on the host: to output at its end, and to and from tensors.
#pragma once

#include <memory>
#include <optional>

#include "core/backend.hpp"

namespace keyfold::gpu {

/// The state of a block's rows: o [groups][rows * heads][padded_value_dim], ml [groups][rows *
/// heads] pairs (m, l).
struct HostState {
  std::unique_ptr<float[]> o;  ///< and ml behind it
  const float* ml = nullptr;
  std::int64_t padded_value_dim = 0;
};

/// Copies the state of the block's rows to or from tensors of the whole call; on the threads of the
/// caller's arena.
void save_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
               const StateView& to);
HostState load_rows(const core::Problem& problem, const core::Block& block, const StateView& from,
                    std::int64_t padded_value_dim);

/// Normalises, sinks included, and writes the block's rows; on the threads of the caller's arena.
/// `finished`: the device has normalised them, and lse stands in the place of m.
void write_rows(const core::Problem& problem, const core::Block& block, const HostState& state,
                const MutableTensorView& out, const std::optional<MutableTensorView>& lse,
                bool finished = false);

}  // namespace keyfold::gpu

// The end of a row: from its state and its sink to the factors of the output, and the logsumexp.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

namespace keyfold::core {

/// out[d] = weight * o[d] / l; see normalised().
struct RowEnd {
  float weight = 1;
  float l = 0;
  float lse = 0;
};

/// The state (m, l) of a finished row and its head's sink.
inline RowEnd end_row(float m, float l, std::optional<float> sink) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  float weight = 1;
  if (sink) {
    const float most = m > *sink || m != m ? m : *sink;
    if (most != kNothing) {
      weight = std::exp(m - most);
      l = l * weight + (*sink == most ? 1.0f : std::exp(*sink - most));  // also for +Inf
      m = most;
    }
  }
  return {weight, l, l == 0 ? kNothing : m + std::log(l)};
}

/// An element of the output. A weight of 0 leaves even Inf out. + 0: whether a zero was summed from
/// hidden keys must not show in its sign.
inline float normalised(const RowEnd& end, float o) {
  return end.l == 0 || end.weight == 0 ? 0.0f : end.weight * o / end.l + 0.0f;
}

}  // namespace keyfold::core

// The picture of a plan: chunks over the query x key plane.
#pragma once

#include <keyfold/plan.hpp>
#include <string>

namespace keyfold::cli {

/// An SVG document. Draws the chunks of group 0 (a key/value head of the first batch entry), each
/// in the shade of its turn; the other groups look the same.
std::string plot_plan(const AttentionShape& shape, const AttentionOptions& options,
                      const Plan& plan);

}  // namespace keyfold::cli

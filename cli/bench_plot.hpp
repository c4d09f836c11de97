// The picture of a benchmark: device time of each dispatch against the budget.
#pragma once

#include <string>
#include <vector>

namespace keyfold::cli {

/// An SVG document. `dispatch_ms` holds the device times of each run, in the order of the
/// dispatches; `setting` is written below the title.
std::string plot_dispatches(const std::vector<std::vector<double>>& dispatch_ms, double budget_ms,
                            const std::string& setting);

}  // namespace keyfold::cli

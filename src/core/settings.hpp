// RunOptions resolved: options win over the environment, which wins over defaults.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "keyfold/options.hpp"

namespace keyfold::core {

struct Settings {
  std::optional<std::string> backend;      ///< unset: the first that can
  std::string backend_source = "backend";  ///< the option or variable that named it
  double budget_seconds = 0.1;
  std::int64_t chunk_size = 0;       ///< keys; 0: by the pacer
  std::int64_t chunk_threshold = 0;  ///< keys; 0: always pace
  std::int64_t max_scratch_bytes = 0;
  int num_threads = 1;
};

/// Throws InvalidArgument that names the option or the variable, its value and the range.
Settings resolve_settings(const RunOptions& options);

}  // namespace keyfold::core

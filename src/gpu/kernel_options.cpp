// Options of a problem.
#include "gpu/kernel_options.hpp"

#include <cstdlib>

#include "gpu/layout.hpp"
#include "keyfold/error.hpp"

namespace keyfold::gpu {

std::uint32_t padded_dim(DType dtype, std::int64_t dim) {
  return static_cast<std::uint32_t>(round_up(dim, 16 / size_of(dtype)));
}

std::uint32_t mask_type(const core::Problem& problem) {
  if (!problem.mask) return 0;
  switch (problem.mask->dtype) {
    case DType::kBool: return 1;
    case DType::kFloat32: return 2;
    case DType::kFloat16: return 3;
    case DType::kBFloat16: return 4;
  }
  return 0;
}

bool finishes_scores(const core::Problem& problem) {
  return problem.mask.has_value() || problem.softcap > 0 || !(problem.scale > 0);
}

std::string kernel_by_name(const char* variable, const std::vector<std::string>& names,
                           const std::string& device) {
  const char* wanted = std::getenv(variable);
  if (wanted == nullptr) return names.front();
  std::string all;
  for (const std::string& name : names) {
    if (name == wanted) return name;
    all += (all.empty() ? "" : ", ") + name;
  }
  throw InvalidArgument(variable, "expected one of " + all + " for " + device + ", got '" +
                                      std::string(wanted) + "'");
}

}  // namespace keyfold::gpu

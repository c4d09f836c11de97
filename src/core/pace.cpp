// The pacer's rule.
#include "core/pace.hpp"

#include <algorithm>

namespace keyfold::core {
namespace {
constexpr double kAim = 0.75;           // of the budget
constexpr double kGrowth = 4.0;         // per dispatch
constexpr double kClockSeconds = 1e-6;  // shorter times are not believed
}  // namespace

Pacer::Pacer(double budget_seconds, double first_flops)
    : target_seconds_(budget_seconds * kAim), next_flops_(first_flops) {}

void Pacer::record(double flops, double seconds) {
  if (!(flops > 0)) return;
  seconds_per_flop_[count_++ % seconds_per_flop_.size()] = std::max(seconds, kClockSeconds) / flops;
  const double slowest = *std::max_element(seconds_per_flop_.begin(), seconds_per_flop_.end());
  // Growth counts from work that was really run: a short last chunk of a sweep says little.
  next_flops_ = std::min(target_seconds_ / slowest, kGrowth * std::max(flops, next_flops_));
}

}  // namespace keyfold::core

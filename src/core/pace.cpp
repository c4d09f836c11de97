// The pacer's rule.
#include "core/pace.hpp"

#include <algorithm>

namespace keyfold::core {
namespace {
constexpr double kAim = 0.75;           // of the budget
constexpr double kGrowth = 4.0;         // per dispatch
constexpr double kClockSeconds = 1e-6;  // shorter times are not believed
constexpr double kLeastShare = 1.0 / 64;
}  // namespace

Pacer::Pacer(double budget_seconds, double first_flops, double least_rate)
    : first_target_seconds_(budget_seconds * kAim),
      next_flops_(std::max(first_flops, first_target_seconds_ * least_rate)) {}

void Pacer::record(double flops, double seconds) {
  if (!(flops > 0)) return;
  seconds_per_flop_[count_++ % seconds_per_flop_.size()] = std::max(seconds, kClockSeconds) / flops;
  const double slowest = *std::max_element(seconds_per_flop_.begin(), seconds_per_flop_.end());
  // Growth counts from work that was really run: a short last chunk of a sweep says little.
  next_flops_ = std::min(first_target_seconds_ * budget_share_ / slowest,
                         kGrowth * std::max(flops, next_flops_));
}

void Pacer::halve_budget() {
  budget_share_ = std::max(budget_share_ / 2, kLeastShare);
  next_flops_ /= 2;
}

}  // namespace keyfold::core

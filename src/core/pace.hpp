// The pacer: how much work the next dispatch may hold, from the device time of those before it.
#pragma once

#include <array>
#include <cstddef>

namespace keyfold::core {

/// Aims each dispatch at 3/4 of the budget, from the slowest of the last four measured speeds, and
/// lets the work grow at most fourfold from one dispatch to the next. Unless the speed itself
/// halves, no dispatch after the first exceeds the budget by more than half.
class Pacer {
 public:
  /// Both > 0. The first dispatch gets `first_flops`, or what the budget's 3/4 hold at
  /// `least_rate`, in flops per second, if that is more.
  Pacer(double budget_seconds, double first_flops, double least_rate = 0);

  /// Work of the next dispatch.
  double next_flops() const { return next_flops_; }
  /// A dispatch of `flops` took `seconds` of device time.
  void record(double flops, double seconds);
  /// Halves the budget, to no less than 1/64 of the first, and the next dispatch.
  void halve_budget();
  /// The budget now as a share of the first.
  double budget_share() const { return budget_share_; }

 private:
  double first_target_seconds_;
  double budget_share_ = 1;
  double next_flops_;
  std::array<double, 4> seconds_per_flop_{};  // ring of the last measurements; 0 = none yet
  std::size_t count_ = 0;
};

}  // namespace keyfold::core

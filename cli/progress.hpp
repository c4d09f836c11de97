// A progress bar with the time left, on stderr.
#pragma once

#include <chrono>
#include <string>

namespace keyfold::cli {

/// Draws itself once the work has taken a second, at most ten times a second, on one line that is
/// wiped by the destructor. With `enabled` false it does nothing.
class ProgressBar {
 public:
  ProgressBar(bool enabled, std::string label);
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// Says which part of the work is on.
  void set_label(std::string label) { label_ = std::move(label); }
  /// `fraction` of all the work, 0 to 1, is done.
  void update(double fraction);
  /// Wipes the line, so that something else can be printed; the next update draws it again.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;
  bool enabled_;
  bool drawn_ = false;
  std::string label_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point next_draw_ = start_ + std::chrono::seconds(1);
};

}  // namespace keyfold::cli

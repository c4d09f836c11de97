#include "progress.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "numbers.hpp"

namespace keyfold::cli {

ProgressBar::ProgressBar(bool enabled, std::string label)
    : enabled_(enabled), label_(std::move(label)) {}

ProgressBar::~ProgressBar() { clear(); }

void ProgressBar::update(double fraction) {
  const Clock::time_point now = Clock::now();
  if (!enabled_ || now < next_draw_) return;
  next_draw_ = now + std::chrono::milliseconds(100);
  drawn_ = true;
  constexpr int kBarWidth = 28;
  fraction = std::clamp(fraction, 0.0, 1.0);
  const int done = static_cast<int>(fraction * kBarWidth);
  std::string left = "...";
  if (fraction > 0) {
    const double elapsed_ms = std::chrono::duration<double, std::milli>(now - start_).count();
    left = readable_ms(elapsed_ms * (1 - fraction) / fraction) + " left";
  }
  std::fputs(fmt::format("\r\033[K{} [{}{}] {:3.0f} %, {}", label_, std::string(done, '#'),
                         std::string(kBarWidth - done, '.'), fraction * 100, left)
                 .c_str(),
             stderr);
  std::fflush(stderr);
}

void ProgressBar::clear() {
  if (!drawn_) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace keyfold::cli

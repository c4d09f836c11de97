#include "bench_plot.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "svg.hpp"

namespace keyfold::cli {
namespace {

constexpr double kWidth = 860, kHeight = 460;
constexpr double kLeft = 80, kRight = 830, kTop = 74, kBottom = 370;

/// At most this many dots per run; more dispatches share a dot.
constexpr std::size_t kMaxDots = 600;

}  // namespace

std::string plot_dispatches(const std::vector<std::vector<double>>& dispatch_ms, double budget_ms,
                            const std::string& setting) {
  std::size_t most = 1;
  double longest = budget_ms;
  for (const std::vector<double>& run : dispatch_ms) {
    most = std::max(most, run.size());
    for (const double ms : run) longest = std::max(longest, ms);
  }
  const double top_ms = longest * 1.15;
  const std::size_t per_dot = (most + kMaxDots - 1) / kMaxDots;
  // Dispatch n, counted from 1, stands in the middle of its share of the axis.
  const auto x = [&](double n) {
    return kLeft + (kRight - kLeft) * (n - 0.5) / static_cast<double>(most);
  };
  const auto y = [&](double ms) { return kBottom - (kBottom - kTop) * ms / top_ms; };

  Svg svg(kWidth, kHeight, "Device time of each dispatch",
          "Dots are dispatches in the order they ran; the dashed line is the budget.");
  svg.text(20, 50, setting, "note");
  for (const double ms : ticks(top_ms, 5)) {
    svg.line(kLeft, y(ms), kRight, y(ms), "grid");
    svg.text(kLeft - 9, y(ms) + 4, fmt::format("{:.4g}", ms), "note", Svg::Anchor::kEnd);
  }
  for (const double n : ticks(static_cast<double>(most), 8)) {
    if (n != static_cast<double>(static_cast<std::size_t>(n))) continue;
    const double label = std::max(n, 1.0);
    svg.line(x(label), kBottom, x(label), kBottom + 5, "axis");
    svg.text(x(label), kBottom + 20, fmt::format("{}", label), "note", Svg::Anchor::kMiddle);
  }
  svg.line(kLeft, kBottom, kRight, kBottom, "axis");
  svg.line(kLeft, kTop, kLeft, kBottom, "axis");

  for (const std::vector<double>& run : dispatch_ms) {
    for (std::size_t begin = 0; begin < run.size(); begin += per_dot) {
      const std::size_t end = std::min(begin + per_dot, run.size());
      const auto at = [&](std::size_t i) { return run.begin() + static_cast<std::ptrdiff_t>(i); };
      const auto slowest = std::max_element(at(begin), at(end));
      const auto n = slowest - run.begin() + 1;
      svg.circle(x(static_cast<double>(n)), y(*slowest), most < 60 ? 4 : 2.5,
                 *slowest > budget_ms ? "orange step-5" : "blue step-5",
                 fmt::format("dispatch {}: {:.4g} ms", n, *slowest));
    }
  }
  svg.line(kLeft, y(budget_ms), kRight, y(budget_ms), "limit");
  svg.text(kRight, y(budget_ms) - 6, fmt::format("budget {:.4g} ms", budget_ms), "label",
           Svg::Anchor::kEnd);
  svg.text((kLeft + kRight) / 2, kBottom + 40, "dispatch", "label", Svg::Anchor::kMiddle);
  svg.text(24, (kTop + kBottom) / 2, "device time, ms", "label", Svg::Anchor::kMiddle, -90);

  const double y_legend = kHeight - 20;
  svg.circle(kLeft + 6, y_legend - 4, 4, "blue step-5");
  svg.text(kLeft + 18, y_legend,
           per_dot == 1
               ? fmt::format("a dispatch ({} runs drawn over each other)", dispatch_ms.size())
               : fmt::format("the longest of {} dispatches ({} runs drawn over each other)",
                             per_dot, dispatch_ms.size()),
           "note");
  svg.circle(kLeft + 396, y_legend - 4, 4, "orange step-5");
  svg.text(kLeft + 408, y_legend, "above the budget", "note");
  return svg.str();
}

}  // namespace keyfold::cli

#include "plan_plot.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "numbers.hpp"
#include "svg.hpp"

namespace keyfold::cli {
namespace {

constexpr double kWidth = 860, kHeight = 520;
constexpr double kLeft = 80, kRight = 830, kTop = 84, kBottom = 420;
/// More boxes than this are thinner than a pixel and make a file that viewers choke on.
constexpr std::size_t kMaxBoxes = 5000;

/// Maps [0, size) to pixels.
struct Scale {
  double size, begin, end;
  double operator()(double value) const {
    return begin + (end - begin) * std::clamp(value / size, 0.0, 1.0);
  }
};

/// Lines along which a row's first or last visible key moves: where key = row + shift.
void draw_diagonal(Svg& svg, const Scale& x, const Scale& y, double shift) {
  const double first = std::max(0.0, -shift), last = std::min(y.size, x.size - shift);
  if (first < last) svg.line(x(first + shift), y(first), x(last + shift), y(last), "limit");
}

void draw_axes(Svg& svg, const Scale& x, const Scale& y) {
  svg.rect(kLeft, kTop, kRight - kLeft, kBottom - kTop, "frame");
  const auto text = [](double value) { return short_length(static_cast<std::int64_t>(value)); };
  for (const double fraction : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    const double key = x.size * fraction, row = y.size * fraction;
    svg.line(x(key), kBottom, x(key), kBottom + 5, "axis");
    svg.text(x(key), kBottom + 20, text(key), "note", Svg::Anchor::kMiddle);
    svg.line(kLeft - 5, y(row), kLeft, y(row), "axis");
    svg.text(kLeft - 9, y(row) + 4, text(row), "note", Svg::Anchor::kEnd);
  }
  svg.text((kLeft + kRight) / 2, kBottom + 40, "key position", "label", Svg::Anchor::kMiddle);
  svg.text(24, (kTop + kBottom) / 2, "query row", "label", Svg::Anchor::kMiddle, -90);
}

}  // namespace

std::string plot_plan(const AttentionShape& shape, const AttentionOptions& options,
                      const Plan& plan) {
  std::vector<std::size_t> drawn;
  for (std::size_t i = 0; i < plan.chunks.size() && drawn.size() < kMaxBoxes; ++i)
    if (plan.chunks[i].group_begin == 0) drawn.push_back(i);

  Svg svg(kWidth, kHeight, "Chunks over the query x key plane",
          "Each box is one dispatch; fainter boxes run earlier.");
  const std::int64_t groups = shape.batch * shape.num_kv_heads;
  svg.text(
      20, 50,
      fmt::format("{} dispatches in all, {} of them on the first of {} key/value heads, which is "
                  "drawn; {}, budget {:.4g} ms",
                  plan.chunks.size(), drawn.size(), groups, plan.kernel, plan.budget_ms),
      "note");

  const Scale x{std::max(1.0, static_cast<double>(shape.kv_len)), kLeft, kRight};
  const Scale y{static_cast<double>(shape.q_len), kTop, kBottom};
  svg.rect(kLeft, kTop, kRight - kLeft, kBottom - kTop, "empty");
  for (std::size_t turn = 0; turn < drawn.size(); ++turn) {
    const ChunkBox& box = plan.chunks[drawn[turn]];
    const double left = x(static_cast<double>(box.key_begin));
    const double top = y(static_cast<double>(box.row_begin));
    const double width = x(static_cast<double>(box.key_end)) - left;
    const double height = y(static_cast<double>(box.row_end)) - top;
    // A pixel of air between boxes that have it to spare.
    const double gap_x = width > 2 ? 1 : 0, gap_y = height > 2 ? 1 : 0;
    const double fraction = static_cast<double>(turn) / static_cast<double>(drawn.size());
    svg.rect(left, top, width - gap_x, height - gap_y, "blue " + step_class(fraction),
             fmt::format("dispatch {}: rows {} to {}, keys {} to {}", drawn[turn] + 1,
                         box.row_begin, box.row_end, box.key_begin, box.key_end));
    const std::string number = fmt::format("{}", drawn[turn] + 1);
    if (width > 9.0 * static_cast<double>(number.size()) + 6 && height > 18)
      svg.text(left + width / 2, top + height / 2 + 4, number, fraction < 0.5 ? "label" : "on-fill",
               Svg::Anchor::kMiddle);
  }

  const std::int64_t keys = options.kv_lens.empty() ? shape.kv_len : options.kv_lens[0];
  const auto offset = static_cast<double>(options.q_offset.value_or(keys - shape.q_len));
  const Window& window = options.window;
  if (options.causal) draw_diagonal(svg, x, y, offset + 1);
  if (window.right) draw_diagonal(svg, x, y, offset + static_cast<double>(*window.right) + 1);
  if (window.left) draw_diagonal(svg, x, y, offset - static_cast<double>(*window.left));
  draw_axes(svg, x, y);

  const double y_legend = kHeight - 22;
  for (int step = 0; step < 8; ++step)
    svg.rect(kLeft + 14 * step, y_legend - 10, 14, 12, "blue " + step_class(step / 8.0));
  svg.text(kLeft + 122, y_legend, "first to last dispatch", "note");
  svg.legend(kLeft + 290, y_legend, "empty", "not visited: no row there sees a key");
  if (options.causal || window.left || window.right) {
    svg.line(kLeft + 545, y_legend - 4, kLeft + 575, y_legend - 4, "limit");
    svg.text(kLeft + 582, y_legend, "edge of what a row sees", "note");
  }
  return svg.str();
}

}  // namespace keyfold::cli

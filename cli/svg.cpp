#include "svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace keyfold::cli {
namespace {

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&': result += "&amp;"; break;
      case '<': result += "&lt;"; break;
      case '>': result += "&gt;"; break;
      default: result += c;
    }
  }
  return result;
}

/// The end of an element: with a tooltip it becomes its child.
std::string closed(std::string_view name, std::string_view tooltip) {
  if (tooltip.empty()) return "/>\n";
  return fmt::format("><title>{}</title></{}>\n", escaped(tooltip), name);
}

constexpr std::string_view kStyle = R"(
text { font: 12px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #57606a; }
.title { font-size: 16px; font-weight: 600; fill: #1f2328; }
.label { fill: #1f2328; }
.on-fill { fill: #ffffff; font-weight: 600; }
.page { fill: #ffffff; }
.axis { stroke: #57606a; }
.grid { stroke: #d8dee4; }
.limit { stroke: #cf222e; stroke-width: 1.5; stroke-dasharray: 6 4; }
.frame { fill: none; stroke: #57606a; }
.empty { fill: #eaeef2; }
.good { fill: #1a7f37; }
.bad { fill: #cf222e; }
.blue { fill: #0969da; }
.orange { fill: #bc4c00; }
.step-0 { fill-opacity: 0.2; }
.step-1 { fill-opacity: 0.3; }
.step-2 { fill-opacity: 0.4; }
.step-3 { fill-opacity: 0.5; }
.step-4 { fill-opacity: 0.6; }
.step-5 { fill-opacity: 0.7; }
.step-6 { fill-opacity: 0.85; }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1; }
.title, .label { fill: #f0f6fc; }
.on-fill { fill: #ffffff; }
.page { fill: #0d1117; }
.axis, .frame { stroke: #9198a1; }
.grid { stroke: #30363d; }
.limit { stroke: #f85149; }
.empty { fill: #21262d; }
.good { fill: #238636; }
.bad { fill: #da3633; }
.blue { fill: #4493f8; }
.orange { fill: #db6d28; }
}
)";

}  // namespace

Svg::Svg(double width, double height, std::string_view title, std::string_view description)
    : width_(width), height_(height) {
  body_ = fmt::format("<title>{}</title>\n<desc>{}</desc>\n<style>{}</style>\n", escaped(title),
                      escaped(description), kStyle);
  rect(0, 0, width, height, "page");
  text(20, 28, title, "title");
}

void Svg::rect(double x, double y, double width, double height, std::string_view classes,
               std::string_view tooltip) {
  body_ += fmt::format("<rect class='{}' x='{:.6g}' y='{:.6g}' width='{:.6g}' height='{:.6g}'",
                       classes, x, y, width, height) +
           closed("rect", tooltip);
}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view classes) {
  body_ += fmt::format("<line class='{}' x1='{:.6g}' y1='{:.6g}' x2='{:.6g}' y2='{:.6g}'/>\n",
                       classes, x1, y1, x2, y2);
}

void Svg::circle(double x, double y, double radius, std::string_view classes,
                 std::string_view tooltip) {
  body_ +=
      fmt::format("<circle class='{}' cx='{:.6g}' cy='{:.6g}' r='{:.6g}'", classes, x, y, radius) +
      closed("circle", tooltip);
}

void Svg::text(double x, double y, std::string_view content, std::string_view classes,
               Anchor anchor, double angle) {
  constexpr const char* kAnchors[] = {"start", "middle", "end"};
  const std::string turn =
      angle == 0 ? "" : fmt::format(" transform='rotate({:.6g} {:.6g} {:.6g})'", angle, x, y);
  body_ += fmt::format("<text class='{}' x='{:.6g}' y='{:.6g}' text-anchor='{}'{}>{}</text>\n",
                       classes, x, y, kAnchors[static_cast<int>(anchor)], turn, escaped(content));
}

void Svg::legend(double x, double y, std::string_view classes, std::string_view meaning) {
  rect(x, y - 10, 12, 12, classes);
  text(x + 18, y, meaning, "note");
}

std::string Svg::str() const {
  return fmt::format(
      "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {0:.6g} {1:.6g}' width='{0:.6g}' "
      "height='{1:.6g}' role='img'>\n{2}</svg>\n",
      width_, height_, body_);
}

std::string step_class(double fraction) {
  constexpr int kSteps = 8;
  return fmt::format("step-{}", std::clamp(static_cast<int>(fraction * kSteps), 0, kSteps - 1));
}

std::vector<double> ticks(double max, int about) {
  const double rough = max / about;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0})
    if (rough <= factor * power) step = factor * power;
  std::vector<double> values;
  for (int i = 0; i * step <= max * (1 + 1e-9); ++i) values.push_back(i * step);
  return values;
}

}  // namespace keyfold::cli

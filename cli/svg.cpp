#include "svg.hpp"

#include <fmt/format.h>

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
text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; font-size: 12px; fill: #57606a; }
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
.series-0 { fill: #0969da; }
.series-1 { fill: #bc4c00; }
.series-2 { fill: #8250df; }
.series-3 { fill: #1b7c83; }
.series-4 { fill: #9a6700; }
.series-5 { fill: #bf3989; }
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
.series-0 { fill: #4493f8; }
.series-1 { fill: #db6d28; }
.series-2 { fill: #ab7df8; }
.series-3 { fill: #2f9e9e; }
.series-4 { fill: #bb8009; }
.series-5 { fill: #db61a2; }
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

}  // namespace keyfold::cli

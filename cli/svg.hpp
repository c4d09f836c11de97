// A tiny SVG writer for the tool's pictures: text as text, readable on light and dark pages.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace keyfold::cli {

/// A picture under construction. Coordinates are pixels from the upper left corner.
///
/// Shapes and text take their colours from classes of the built-in style sheet, which follows the
/// reader's light or dark theme: text `title`, `note`, `label`, `on-fill` (white, for use on a
/// colour); lines `axis`, `grid`, `limit`; fills `blue`, `orange`, `good`, `bad`, `empty`, `frame`
/// (outline only); with a fill, `step-0` (pale) to `step-7` (full). Classes are joined by a space.
class Svg {
 public:
  /// `title` is drawn at the top left and is, with `description`, what a screen reader says.
  Svg(double width, double height, std::string_view title, std::string_view description);

  enum class Anchor { kStart, kMiddle, kEnd };

  /// `tooltip`, if not empty, is shown by browsers when the pointer rests on the shape.
  void rect(double x, double y, double width, double height, std::string_view classes,
            std::string_view tooltip = {});
  void line(double x1, double y1, double x2, double y2, std::string_view classes);
  void circle(double x, double y, double radius, std::string_view classes,
              std::string_view tooltip = {});
  /// `angle` in degrees, clockwise around (x, y).
  void text(double x, double y, std::string_view content, std::string_view classes,
            Anchor anchor = Anchor::kStart, double angle = 0);
  /// A colour swatch and its meaning.
  void legend(double x, double y, std::string_view classes, std::string_view meaning);

  /// The finished document.
  std::string str() const;

 private:
  double width_, height_;
  std::string body_;
};

/// The class of a shade for `fraction` of the whole, 0 to 1: "step-0" to "step-7".
std::string step_class(double fraction);

/// Round values 0, d, 2d, ... up to `max` > 0, about `about` of them.
std::vector<double> ticks(double max, int about);

}  // namespace keyfold::cli

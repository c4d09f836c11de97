#include "needle_report.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "numbers.hpp"
#include "svg.hpp"

namespace keyfold::cli {
namespace {

/// What a wrong answer says may be any bytes; this is fit for terminals and JSON.
std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
  return text;
}

double attention_ms(const Answer& answer) { return answer.prefill_ms + answer.decode_ms; }

std::string_view verdict(const NeedleResult& result) { return result.passed() ? "pass" : "FAIL"; }

std::vector<std::int64_t> distinct(const std::vector<NeedleResult>& results,
                                   std::int64_t NeedleResult::*field) {
  std::vector<std::int64_t> values;
  values.reserve(results.size());
  for (const NeedleResult& result : results) values.push_back(result.*field);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  return values;
}

std::int64_t index_of(const std::vector<std::int64_t>& values, std::int64_t value) {
  return std::lower_bound(values.begin(), values.end(), value) - values.begin();
}

}  // namespace

std::string table_heading() {
  return fmt::format("{:>8}  {:>5}  {:<6}  {:>12}  {:>10}  {:>16}  {:>11}  {}", "context", "depth",
                     "result", "time", "dispatches", "longest dispatch", "peak memory", "answer");
}

std::string table_line(const NeedleResult& result) {
  const Answer& answer = result.answer;
  return fmt::format("{:>8}  {:>3} %  {:<6}  {:>12}  {:>10}  {:>16}  {:>11}  {}",
                     short_length(result.context), result.depth, verdict(result),
                     readable_ms(attention_ms(answer)), answer.dispatches,
                     readable_ms(answer.longest_dispatch_ms), readable_bytes(answer.peak_bytes),
                     printable(answer.text));
}

nlohmann::ordered_json as_json(const NeedleResult& result) {
  const Answer& answer = result.answer;
  return {{"context", result.context},
          {"depth_percent", result.depth},
          {"passed", result.passed()},
          {"expected", result.expected},
          {"answer", printable(answer.text)},
          {"backend", answer.backend},
          {"kernel", answer.kernel},
          {"embed_ms", answer.embed_ms},
          {"prefill_ms", answer.prefill_ms},
          {"decode_ms", answer.decode_ms},
          {"dispatches", answer.dispatches},
          {"longest_dispatch_ms", answer.longest_dispatch_ms},
          {"key_value_bytes", answer.cache_bytes},
          {"scratch_bytes", answer.scratch_bytes},
          {"peak_memory_bytes", answer.peak_bytes}};
}

std::string heat_map(const std::vector<NeedleResult>& results, std::string_view setting) {
  constexpr double kLeft = 90, kTop = 84, kCellWidth = 96, kCellHeight = 52, kGap = 3, kBelow = 56;
  const std::vector<std::int64_t> contexts = distinct(results, &NeedleResult::context);
  const std::vector<std::int64_t> depths = distinct(results, &NeedleResult::depth);
  const auto columns = static_cast<double>(contexts.size());
  const auto rows = static_cast<double>(depths.size());
  const auto passed = std::count_if(results.begin(), results.end(),
                                    [](const NeedleResult& result) { return result.passed(); });
  const std::string title =
      fmt::format("Needle in a haystack: {} of {} found", passed, results.size());

  Svg svg(std::max(kLeft + columns * kCellWidth + 24, 560.0), kTop + rows * kCellHeight + kBelow,
          title, setting);
  svg.text(20, 50, setting, "note");
  svg.text(kLeft - 12, kTop - 12, "depth", "note", Svg::Anchor::kEnd);
  for (std::size_t row = 0; row < depths.size(); ++row)
    svg.text(kLeft - 12, kTop + (static_cast<double>(row) + 0.5) * kCellHeight + 4,
             fmt::format("{} %", depths[row]), "label", Svg::Anchor::kEnd);
  const double below = kTop + rows * kCellHeight;
  for (std::size_t column = 0; column < contexts.size(); ++column)
    svg.text(kLeft + (static_cast<double>(column) + 0.5) * kCellWidth, below + 18,
             short_length(contexts[column]), "label", Svg::Anchor::kMiddle);
  svg.text(kLeft, below + 40, "context: bytes of text, each a key and a value", "note");

  for (const NeedleResult& result : results) {
    const double x = kLeft + static_cast<double>(index_of(contexts, result.context)) * kCellWidth;
    const double y = kTop + static_cast<double>(index_of(depths, result.depth)) * kCellHeight;
    svg.rect(
        x, y, kCellWidth - kGap, kCellHeight - kGap, result.passed() ? "good" : "bad",
        fmt::format("{} dispatches, longest {}; answer: {}", result.answer.dispatches,
                    readable_ms(result.answer.longest_dispatch_ms), printable(result.answer.text)));
    const double middle = x + (kCellWidth - kGap) / 2;
    svg.text(middle, y + 22, verdict(result), "on-fill", Svg::Anchor::kMiddle);
    svg.text(middle, y + 38, readable_ms(attention_ms(result.answer)), "on-fill",
             Svg::Anchor::kMiddle);
  }
  return svg.str();
}

}  // namespace keyfold::cli

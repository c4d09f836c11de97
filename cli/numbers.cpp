#include "numbers.hpp"

#include <fmt/format.h>

#include <charconv>
#include <keyfold/error.hpp>

namespace keyfold::cli {
namespace {

constexpr std::int64_t kNoMax = std::numeric_limits<std::int64_t>::max();

std::string expected(Range range) {
  constexpr std::int64_t kUnbounded = std::int64_t{1} << 60;  // nobody means such a bound
  std::string text = "a whole number";
  if (range.max < kUnbounded)
    text += fmt::format(" from {} to {}", range.min, range.max);
  else if (range.min > -kUnbounded)
    text += fmt::format(" of at least {}", range.min);
  return text + " (K, M and G multiply by 1024)";
}

}  // namespace

std::int64_t parse_length(const std::string& argument, std::string_view text, Range range) {
  const auto fail = [&] {
    return InvalidArgument(argument, fmt::format("expected {}, got '{}'", expected(range), text));
  };
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || end - rest > 1) throw fail();
  int shift = 0;
  if (rest != end) {
    switch (*rest) {
      case 'k':
      case 'K': shift = 10; break;
      case 'm':
      case 'M': shift = 20; break;
      case 'g':
      case 'G': shift = 30; break;
      default: throw fail();
    }
  }
  if (value > (kNoMax >> shift) || value < -(kNoMax >> shift)) throw fail();
  value *= std::int64_t{1} << shift;
  if (value < range.min || value > range.max) throw fail();
  return value;
}

double parse_number(const std::string& argument, std::string_view text, double min, double max) {
  double value = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || rest != end || !(value >= min && value <= max))
    throw InvalidArgument(argument,
                          fmt::format("expected a number from {} to {}, got '{}'", min, max, text));
  return value;
}

CLI::Option* add_checked(CLI::App& app, const std::string& name, const char* type,
                         const std::string& help, std::function<void(const std::string&)> read) {
  const auto callback = [read = std::move(read)](const CLI::results_t& results) {
    try {
      read(results.back());
    } catch (const InvalidArgument& error) {
      throw CLI::ValidationError(error.what());
    }
    return true;
  };
  return app.add_option(name, callback, help)->type_name(type)->type_size(1)->expected(1);
}

CLI::Option* add_length(CLI::App& app, const std::string& name, std::int64_t& value, Range range,
                        const std::string& help) {
  return add_checked(app, name, "N", help,
                     [&value, name, range](const std::string& text) {
                       value = parse_length(name, text, range);
                     })
      ->default_str(short_length(value));
}

CLI::Option* add_length(CLI::App& app, const std::string& name, std::optional<std::int64_t>& value,
                        Range range, const std::string& help) {
  return add_checked(app, name, "N", help, [&value, name, range](const std::string& text) {
    value = parse_length(name, text, range);
  });
}

CLI::Option* add_lengths(CLI::App& app, const std::string& name, std::vector<std::int64_t>& values,
                         Range range, const std::string& help) {
  return add_checked(app, name, "N,N,...", help, [&values, name, range](const std::string& text) {
    values.clear();
    for (std::size_t begin = 0; begin <= text.size();) {
      const std::size_t comma = std::min(text.find(',', begin), text.size());
      values.push_back(
          parse_length(name, std::string_view(text).substr(begin, comma - begin), range));
      begin = comma + 1;
    }
  });
}

CLI::Option* add_number(CLI::App& app, const std::string& name, std::optional<double>& value,
                        double min, double max, const std::string& help) {
  return add_checked(app, name, "X", help, [&value, name, min, max](const std::string& text) {
    value = parse_number(name, text, min, max);
  });
}

std::string short_length(std::int64_t value) {
  constexpr std::int64_t kKi = 1024;
  if (value >= kKi * kKi && value % (kKi * kKi) == 0)
    return fmt::format("{}M", value / (kKi * kKi));
  if (value >= kKi && value % kKi == 0) return fmt::format("{}K", value / kKi);
  return fmt::format("{}", value);
}

std::string readable_bytes(std::int64_t bytes) {
  constexpr std::int64_t kKi = 1024;
  const auto value = static_cast<double>(bytes);
  if (bytes < kKi) return fmt::format("{} B", bytes);
  if (bytes < kKi * kKi) return fmt::format("{:.1f} KiB", value / kKi);
  if (bytes < kKi * kKi * kKi) return fmt::format("{:.1f} MiB", value / (kKi * kKi));
  return fmt::format("{:.1f} GiB", value / (kKi * kKi * kKi));
}

std::string readable_ms(double ms) {
  constexpr double kSecond = 1000, kMinute = 60 * kSecond, kHour = 60 * kMinute;
  if (ms < 10) return fmt::format("{:.2f} ms", ms);
  if (ms < kSecond) return fmt::format("{:.1f} ms", ms);
  if (ms < kMinute) return fmt::format("{:.1f} s", ms / kSecond);
  const auto seconds = static_cast<std::int64_t>(ms / kSecond);
  if (ms < kHour) return fmt::format("{} min {:02} s", seconds / 60, seconds % 60);
  return fmt::format("{} h {:02} min", seconds / 3600, seconds / 60 % 60);
}

}  // namespace keyfold::cli

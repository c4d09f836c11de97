// Numbers on the command line: lengths such as 131072, 128K and 1M, lists, and readable output.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace keyfold::cli {

/// Inclusive bounds of a whole number.
struct Range {
  std::int64_t min = -std::numeric_limits<std::int64_t>::max();
  std::int64_t max = std::numeric_limits<std::int64_t>::max();
};

/// Reads a whole number, with K, M or G for 2^10, 2^20 or 2^30 behind it. Throws
/// InvalidArgument(`argument`) when it does not parse, overflows or is out of range.
std::int64_t parse_length(const std::string& argument, std::string_view text, Range range);
/// Reads a number from `min` to `max`; throws in the same way.
double parse_number(const std::string& argument, std::string_view text, double min, double max);

/// Adds an option whose text goes to `read`; an InvalidArgument that it throws becomes a fault of
/// the command line.
CLI::Option* add_checked(CLI::App& app, const std::string& name, const char* type,
                         const std::string& help, std::function<void(const std::string&)> read);
/// Adds an option that takes one whole number; its parse errors name the option.
CLI::Option* add_length(CLI::App& app, const std::string& name, std::int64_t& value, Range range,
                        const std::string& help);
CLI::Option* add_length(CLI::App& app, const std::string& name, std::optional<std::int64_t>& value,
                        Range range, const std::string& help);
/// Adds an option that takes whole numbers separated by commas.
CLI::Option* add_lengths(CLI::App& app, const std::string& name, std::vector<std::int64_t>& values,
                         Range range, const std::string& help);
/// Adds an option that takes one number.
CLI::Option* add_number(CLI::App& app, const std::string& name, std::optional<double>& value,
                        double min, double max, const std::string& help);

/// 131072 -> "128K", 1048576 -> "1M", 1000 -> "1000".
std::string short_length(std::int64_t value);
/// "512 B", "1.5 KiB", "256.0 MiB".
std::string readable_bytes(std::int64_t bytes);
/// "0.12 ms", "12.3 ms", "1.2 s", "2 min 05 s", "1 h 07 min".
std::string readable_ms(double ms);

}  // namespace keyfold::cli

// Options over environment over defaults, each checked against its range.
#include "core/settings.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <string_view>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace keyfold::core {
namespace {

template <class T>
struct Range {
  T least, most;
};

template <class T>
std::string describe(const Range<T>& range) {
  std::ostringstream text;
  text << "expected " << (std::is_integral_v<T> ? "an integer" : "a number") << " from "
       << range.least << " to " << range.most;
  return text.str();
}

template <class T>
T checked(const std::string& name, T value, const Range<T>& range) {
  if (!(value >= range.least && value <= range.most)) {  // false for NaN too
    std::ostringstream text;
    text << describe(range) << ", got " << value;
    throw InvalidArgument(name, text.str());
  }
  return value;
}

template <class T>
T parse(const std::string& name, std::string_view text, const Range<T>& range) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() ||
      !(value >= range.least && value <= range.most)) {
    throw InvalidArgument(name, describe(range) + ", got '" + std::string(text) + "'");
  }
  return value;
}

/// The option, else the first variable that is set, else the default.
template <class T>
T choose(const std::optional<T>& option, const char* option_name,
         std::initializer_list<const char*> variables, const Range<T>& range, T fallback) {
  if (option) return checked(option_name, *option, range);
  for (const char* variable : variables) {
    if (const char* text = std::getenv(variable)) return parse(variable, text, range);
  }
  return fallback;
}

/// Processors that this process may use.
int available_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

Settings resolve_settings(const RunOptions& options) {
  constexpr std::int64_t kMaxKeys = std::int64_t{1} << 60;
  constexpr std::int64_t kMiB = 1 << 20;
  constexpr Range<std::int64_t> kScratchMiB{1, std::int64_t{1} << 30};
  constexpr std::int64_t kDefaultScratchMiB = 256;

  Settings s;
  s.backend = options.backend;
  if (!s.backend) {
    if (const char* name = std::getenv("KEYFOLD_BACKEND")) {
      s.backend = name;
      s.backend_source = "KEYFOLD_BACKEND";
    }
  }
  s.budget_seconds = 1e-3 * choose<double>(options.budget_ms, "budget_ms", {"KEYFOLD_BUDGET_MS"},
                                           {0.1, 60000.0}, 100.0);
  s.chunk_size =
      choose<std::int64_t>(options.chunk_size, "chunk_size",
                           {"KEYFOLD_CHUNK_SIZE", "MLX_SDPA_CHUNK_SIZE"}, {1, kMaxKeys}, 0);
  s.chunk_threshold = choose<std::int64_t>(options.chunk_threshold, "chunk_threshold",
                                           {"KEYFOLD_CHUNK_THRESHOLD", "MLX_SDPA_CHUNK_THRESHOLD"},
                                           {0, kMaxKeys}, 0);
  s.max_scratch_bytes =
      options.max_scratch_bytes
          ? checked<std::int64_t>("max_scratch_bytes", *options.max_scratch_bytes,
                                  {1, kScratchMiB.most * kMiB})
          : kMiB * choose<std::int64_t>(std::nullopt, "", {"KEYFOLD_MAX_SCRATCH_MB"}, kScratchMiB,
                                        kDefaultScratchMiB);
  // More than there are processors would only take turns; oneTBB makes none, and complains.
  const int most = available_threads();
  s.num_threads = std::min(most, choose<int>(options.num_threads, "num_threads",
                                             {"KEYFOLD_NUM_THREADS"}, {1, 4096}, most));
  return s;
}

}  // namespace keyfold::core

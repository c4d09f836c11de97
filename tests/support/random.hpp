// Seeded random data and the scale of a test run.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace keyfold::test {

/// KEYFOLD_TEST_SEED, or a fresh one that is printed.
std::uint64_t base_seed();

/// How much to test: KEYFOLD_TEST_SCALE = tiny (emulators), quick (sanitizers) or full (default).
enum class Scale { kTiny, kQuick, kFull };
Scale scale();
/// The value for the present scale.
template <class T>
T by_scale(T tiny, T quick, T full) {
  return scale() == Scale::kTiny ? tiny : scale() == Scale::kQuick ? quick : full;
}

/// splitmix64 (Steele, Lea and Flood 2014): the same numbers with every standard library.
class Rng {
 public:
  /// The stream of `label` under the base seed.
  explicit Rng(std::string_view label);

  std::uint64_t bits();
  /// In [0, 1).
  double uniform();
  /// In [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high);
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  /// Mean 0, variance 1.
  float normal();
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(from.size()) - 1))];
  }

 private:
  std::uint64_t state_;
  float spare_ = 0;  // Box-Muller makes two
  bool has_spare_ = false;
};

}  // namespace keyfold::test

// Seeded random data and the scale of a test run.
#include "support/random.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numbers>
#include <random>
#include <stdexcept>
#include <string>

namespace keyfold::test {

std::uint64_t base_seed() {
  static const std::uint64_t seed = [] {
    const char* text = std::getenv("KEYFOLD_TEST_SEED");
    const std::uint64_t value = text != nullptr ? std::stoull(text) : std::random_device{}();
    std::fprintf(stderr, "KEYFOLD_TEST_SEED=%llu\n", static_cast<unsigned long long>(value));
    return value;
  }();
  return seed;
}

Scale scale() {
  static const Scale value = [] {
    const char* text = std::getenv("KEYFOLD_TEST_SCALE");
    const std::string name = text != nullptr ? text : "full";
    if (name == "tiny") return Scale::kTiny;
    if (name == "quick") return Scale::kQuick;
    // The suite is run once for each forced kernel: quick is enough there.
    if (name == "full" && std::getenv("KEYFOLD_CPU_ISA") != nullptr) return Scale::kQuick;
    if (name == "full") return Scale::kFull;
    throw std::invalid_argument("KEYFOLD_TEST_SCALE: expected tiny, quick or full, got " + name);
  }();
  return value;
}

Rng::Rng(std::string_view label) : state_(base_seed()) {
  for (const char c : label) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
}

std::uint64_t Rng::bits() {
  std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double Rng::uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

std::int64_t Rng::between(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
}

float Rng::normal() {
  if (has_spare_) {
    has_spare_ = false;
    return spare_;
  }
  const float radius =
      std::sqrt(-2.0f * std::log(1.0f - static_cast<float>(bits() >> 40) * 0x1p-24f));
  const float angle = 2.0f * std::numbers::pi_v<float> * static_cast<float>(uniform());
  spare_ = radius * std::sin(angle);
  has_spare_ = true;
  return radius * std::cos(angle);
}

}  // namespace keyfold::test

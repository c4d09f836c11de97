// The 16-bit formats, every value of them.
#include "core/half.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace keyfold::core {
namespace {

struct Format {
  const char* name;
  float (*widen)(std::uint16_t);
  std::uint16_t (*narrow)(float);
  std::uint16_t infinity;
};
const Format kFormats[] = {{"float16", float16_to_float, float_to_float16, 0x7c00},
                           {"bfloat16", bfloat16_to_float, float_to_bfloat16, 0x7f80}};

TEST(Half, KnownValues) {
  EXPECT_EQ(float_to_float16(1.0f), 0x3c00);
  EXPECT_EQ(float_to_float16(-2.0f), 0xc000);
  EXPECT_EQ(float_to_float16(65504.0f), 0x7bff);
  EXPECT_EQ(float_to_float16(0x1p-24f), 0x0001);
  EXPECT_EQ(float_to_float16(0x1p-14f), 0x0400);
  EXPECT_EQ(float_to_bfloat16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bfloat16(-3.0f), 0xc040);
  EXPECT_EQ(bfloat16_to_float(0x0001), 0x1p-133f);
  EXPECT_EQ(float16_to_float(0x3555), 0.333251953125f);
}

TEST(Half, EveryValueComesBack) {
  for (const Format& f : kFormats) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
      const auto half = static_cast<std::uint16_t>(bits);
      const float wide = f.widen(half);
      if ((half & 0x7fff) > f.infinity) {
        EXPECT_TRUE(std::isnan(wide)) << f.name << bits;
        EXPECT_TRUE(std::isnan(f.widen(f.narrow(wide)))) << f.name << bits;
      } else {
        EXPECT_EQ(f.narrow(wide), half) << f.name << bits;
      }
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (const Format& f : kFormats) {
    for (std::uint16_t low = 0; low < f.infinity; ++low) {
      const auto high = static_cast<std::uint16_t>(low + 1);
      const double next = high == f.infinity
                              ? 2.0 * f.widen(low) - f.widen(static_cast<std::uint16_t>(low - 1))
                              : f.widen(high);
      const auto middle = static_cast<float>((f.widen(low) + next) / 2);
      const std::uint16_t even = low % 2 == 0 ? low : high;
      EXPECT_EQ(f.narrow(middle), even) << f.name << low;
      EXPECT_EQ(f.narrow(-middle), even | 0x8000) << f.name << low;
      EXPECT_EQ(f.narrow(std::nextafter(middle, 0.0f)), low) << f.name << low;
      EXPECT_EQ(f.narrow(std::nextafter(middle, HUGE_VALF)), high) << f.name << low;
    }
    EXPECT_EQ(f.narrow(std::numeric_limits<float>::max()), f.infinity);
    EXPECT_EQ(f.narrow(HUGE_VALF), f.infinity);
  }
}

}  // namespace
}  // namespace keyfold::core

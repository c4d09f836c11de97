// Numbers as users write them, and as the tool writes them.
#include "numbers.hpp"

#include <gmock/gmock.h>

#include "../io/files.hpp"
#include "call_flags.hpp"

namespace keyfold::cli::test {
namespace {

using io::test::throws_invalid;
using ::testing::ElementsAre;

TEST(Numbers, LengthsTakeBinaryUnits) {
  EXPECT_EQ(parse_length("n", "0", {}), 0);
  EXPECT_EQ(parse_length("n", "131072", {}), 131072);
  EXPECT_EQ(parse_length("n", "128K", {}), 131072);
  EXPECT_EQ(parse_length("n", "1m", {}), 1 << 20);
  EXPECT_EQ(parse_length("n", "-2G", {}), -(std::int64_t{2} << 30));
  EXPECT_EQ(parse_length("n", "9223372036854775807", {}), 9223372036854775807);
}

TEST(Numbers, WrongLengthsNameTheArgument) {
  for (const char* text : {"", "K", "abc", "1e99", "1.5K", "12KB", "0x10", " 1", "1 ", "+1", "--1",
                           "9223372036854775808", "9007199254740992K", "8589934592G"})
    EXPECT_THAT([&] { parse_length("--kv-len", text, {}); },
                throws_invalid("--kv-len: expected a whole number (K, M and G multiply by 1024), "
                               "got '" +
                               std::string(text) + "'"))
        << text;
  EXPECT_THAT([] { parse_length("n", "5", {.min = 1, .max = 4}); }, throws_invalid("from 1 to 4"));
  EXPECT_THAT([] { parse_length("n", "0", {.min = 1}); }, throws_invalid("of at least 1"));
}

TEST(Numbers, RealNumbersKeepToTheirRange) {
  EXPECT_EQ(parse_number("x", "2.5", 0, 10), 2.5);
  EXPECT_EQ(parse_number("x", "1e1", 0, 10), 10);
  for (const char* text : {"", "abc", "nan", "inf", "-1", "11", "1e99", "1 ", "0x1"})
    EXPECT_THAT(
        [&] { parse_number("--x", text, 0, 10); },
        throws_invalid("--x: expected a number from 0 to 10, got '" + std::string(text) + "'"))
        << text;
}

TEST(Numbers, ListsAreSplitAtCommas) {
  CLI::App app;
  std::vector<std::int64_t> values;
  add_lengths(app, "--lens", values, {.min = 0}, "");
  app.parse("--lens 1,2K,0");
  EXPECT_THAT(values, ElementsAre(1, 2048, 0));
  for (const char* text : {"1,", ",1", "1,,2", "1;2", "1,-1"})
    EXPECT_THROW(app.parse(std::string("--lens ") + text), CLI::ValidationError) << text;
}

TEST(Numbers, AreReadable) {
  EXPECT_EQ(short_length(131072), "128K");
  EXPECT_EQ(short_length(3 << 20), "3M");
  EXPECT_EQ(short_length(131073), "131073");
  EXPECT_EQ(short_length(0), "0");
  EXPECT_EQ(readable_bytes(512), "512 B");
  EXPECT_EQ(readable_bytes(1536), "1.5 KiB");
  EXPECT_EQ(readable_bytes(std::int64_t{3} << 30), "3.0 GiB");
  EXPECT_EQ(readable_ms(0.5), "0.50 ms");
  EXPECT_EQ(readable_ms(125000), "2 min 05 s");
  EXPECT_EQ(readable_ms(3600000.0 * 2 + 60000), "2 h 01 min");
}

// The pairs, counted one by one from the definition.
double counted_pairs(const AttentionShape& s, const AttentionOptions& o) {
  double pairs = 0;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    const std::int64_t keys = o.kv_lens.empty() ? s.kv_len : o.kv_lens[static_cast<std::size_t>(b)];
    for (std::int64_t i = 0; i < s.q_len; ++i)
      for (std::int64_t j = 0; j < keys; ++j) {
        const std::int64_t p = o.q_offset.value_or(keys - s.q_len) + i;
        pairs += !(o.causal && j > p) && !(o.window.left && j < p - *o.window.left) &&
                 !(o.window.right && j > p + *o.window.right);
      }
  }
  return pairs * static_cast<double>(s.num_heads);
}

TEST(Numbers, VisiblePairsFollowTheMask) {
  const AttentionShape shape{.batch = 2, .num_heads = 3, .q_len = 7, .kv_len = 20};
  const std::int64_t lens[] = {20, 5};
  AttentionOptions options;
  for (const bool causal : {false, true})
    for (const bool ragged : {false, true})
      for (const std::optional<std::int64_t> left : {std::optional<std::int64_t>(), {0}, {3}})
        for (const std::optional<std::int64_t> right : {std::optional<std::int64_t>(), {2}})
          for (const std::optional<std::int64_t> offset :
               {std::optional<std::int64_t>(), {-4}, {30}}) {
            options.causal = causal;
            options.kv_lens =
                ragged ? std::span<const std::int64_t>(lens) : std::span<const std::int64_t>();
            options.window = {left, right};
            options.q_offset = offset;
            EXPECT_EQ(visible_pairs(shape, options), counted_pairs(shape, options));
          }
}

}  // namespace
}  // namespace keyfold::cli::test

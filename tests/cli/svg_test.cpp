// Pictures: what is in them, and that any text is safe in them.
#include "svg.hpp"

#include <gmock/gmock.h>

#include "bench_plot.hpp"
#include "plan_plot.hpp"

namespace keyfold::cli::test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

TEST(Svg, EscapesTextAndClosesElements) {
  Svg svg(10, 20, "a < b & c", "d > e");
  svg.rect(1, 2, 3, 4, "good", "<tip>");
  svg.text(1, 2, "</text>", "note");
  const std::string document = svg.str();
  EXPECT_THAT(document, AllOf(HasSubstr("<title>a &lt; b &amp; c</title>"),
                              HasSubstr("<desc>d &gt; e</desc>"), HasSubstr("&lt;tip&gt;"),
                              HasSubstr(">&lt;/text&gt;</text>"), HasSubstr("width='10'")));
  EXPECT_EQ(count(document, "<text"), count(document, "</text>"));
  EXPECT_TRUE(document.ends_with("</svg>\n"));
}

TEST(Svg, TicksAreRound) {
  EXPECT_THAT(ticks(115, 5), ElementsAre(0, 50, 100));
  EXPECT_THAT(ticks(1, 4), ElementsAre(0, 0.5, 1));
  EXPECT_THAT(ticks(8, 8), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8));
}

TEST(Svg, StepsCoverTheWhole) {
  EXPECT_EQ(step_class(-1), "step-0");
  EXPECT_EQ(step_class(0.5), "step-4");
  EXPECT_EQ(step_class(1), "step-7");
}

TEST(Plots, PlanDrawsEachChunkOfTheFirstGroup) {
  const AttentionShape shape{.num_heads = 2, .num_kv_heads = 2, .q_len = 100, .kv_len = 1000};
  Plan plan;
  plan.chunks = {{0, 2, 0, 100, 0, 512}, {0, 1, 0, 100, 512, 1000}, {1, 2, 0, 100, 512, 1000}};
  AttentionOptions options;
  const std::string full = plot_plan(shape, options, plan);
  EXPECT_THAT(full, AllOf(HasSubstr("3 dispatches in all, 2 of them"),
                          HasSubstr("dispatch 2: rows 0 to 100, keys 512 to 1000"),
                          Not(HasSubstr("dispatch 3:")), Not(HasSubstr("edge of what"))));
  options.causal = true;
  EXPECT_THAT(plot_plan(shape, options, plan), HasSubstr("edge of what a row sees"));
}

TEST(Plots, PlanWithoutKeysIsAnEmptyPlane) {
  EXPECT_THAT(plot_plan({.q_len = 1, .kv_len = 0}, {}, {}), HasSubstr("0 dispatches"));
}

TEST(Plots, DispatchesAboveTheBudgetStandOut) {
  const std::string plot = plot_dispatches({{1, 9, 12}, {2, 8}}, 10, "setting");
  EXPECT_THAT(
      plot, AllOf(HasSubstr("setting"), HasSubstr("budget 10 ms"), HasSubstr("dispatch 3: 12 ms")));
  EXPECT_EQ(count(plot, "<circle class='blue"), 4U + 1);    // and the legend
  EXPECT_EQ(count(plot, "<circle class='orange"), 1U + 1);  // and the legend
}

TEST(Plots, ManyDispatchesShareDots) {
  std::vector<double> run(10000, 1.0);
  run[4321] = 7;
  const std::string plot = plot_dispatches({run}, 10, "");
  EXPECT_LT(count(plot, "<circle"), 700U);
  EXPECT_THAT(plot,
              AllOf(HasSubstr("the longest of 17 dispatches"), HasSubstr("dispatch 4322: 7 ms")));
}

TEST(Plots, NothingMeasuredIsNoFault) {
  EXPECT_THAT(plot_dispatches({{}}, 10, ""), HasSubstr("budget 10 ms"));
}

}  // namespace
}  // namespace keyfold::cli::test

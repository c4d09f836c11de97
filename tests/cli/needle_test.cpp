// The needle test itself: attention finds the fact, and only attention; nothing else could.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <keyfold/error.hpp>
#include <random>

#include "core/half.hpp"
#include "haystack.hpp"
#include "needle_report.hpp"
#include "needle_trial.hpp"
#include "tool.hpp"

namespace keyfold::cli {
namespace {

namespace fs = std::filesystem;

/// Words drawn at random from a small list, so that short matches abound as they do in real text.
std::string prose(std::size_t bytes, std::uint64_t seed = 7) {
  constexpr std::array kWords = {"the ", "pass ", "of ", "is '", "phrase ", "key ", "fold\n", "a "};
  std::mt19937_64 random(seed);
  std::string text;
  while (text.size() < bytes) text += kWords[random() % kWords.size()];
  text.resize(bytes);
  return text;
}

std::string whole(const Text& text) { return text.read(0, text.size); }

Team alone;

/// Quick also under sanitizers: the work grows with the square of the length.
constexpr std::size_t kTextSize = 4096;
constexpr HeadShape kSmallHeads{4, 2, 64, DType::kFloat32};

/// A folder of its own for each test, removed afterwards.
class NeedleFiles : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / (std::string("keyfold-needle-") + test->name());
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string write(const std::string& name, std::string_view text) const {
    fs::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << text;
    return (folder_ / name).string();
  }

  fs::path folder_;
};

struct Setting {
  DType dtype;
  std::optional<std::int64_t> chunk_size;
};

class FindsNeedle : public testing::TestWithParam<Setting> {};

TEST_P(FindsNeedle, AtEveryDepth) {
  const std::string haystack = prose(kTextSize);
  HeadShape shape = kSmallHeads;
  shape.dtype = GetParam().dtype;
  RunOptions run;
  run.chunk_size = GetParam().chunk_size;
  for (const std::int64_t depth : {0, 10, 50, 90, 100}) {
    const Needle needle = make_needle(static_cast<std::uint64_t>(depth));
    const Answer reply = answer(hide(needle, haystack, kTextSize, depth), shape, 3, run, alone);
    EXPECT_EQ(reply.text, needle.phrase) << "depth " << depth;
    // Prefill, twelve letters and the quote: one dispatch each at least, more with small chunks.
    EXPECT_GE(reply.dispatches, run.chunk_size ? 2 * 13 : 13);
    EXPECT_GT(reply.longest_dispatch_ms, 0);
    EXPECT_GT(reply.peak_bytes, reply.cache_bytes);
  }
}

INSTANTIATE_TEST_SUITE_P(DTypesAndChunks, FindsNeedle,
                         testing::Values(Setting{DType::kFloat32, {}}, Setting{DType::kFloat16, {}},
                                         Setting{DType::kBFloat16, {}}, Setting{DType::kFloat32, 1},
                                         Setting{DType::kFloat16, 1}, Setting{DType::kBFloat16, 1}),
                         [](const auto& test) {
                           return std::string(name_of(test.param.dtype)) +
                                  (test.param.chunk_size ? "SmallChunks" : "Paced");
                         });

TEST(Needle, OtherShapesOfHeadsFindItToo) {
  const Needle needle = make_needle(1);
  const std::string text = whole(hide(needle, prose(2048), 2048, 30));
  for (const HeadShape& shape :
       {HeadShape{1, 1, 64, DType::kFloat32}, HeadShape{6, 3, 72, DType::kFloat16},
        HeadShape{16, 1, 576, DType::kBFloat16}})
    EXPECT_EQ(answer(text, shape, 5, {}, alone).text, needle.phrase) << shape.head_dim;
}

TEST(Needle, WithoutTheFactThereIsNoPhrase) {
  const Needle needle = make_needle(1);
  std::string text = whole(hide(needle, prose(kTextSize), kTextSize, 50));
  text.erase(text.find(needle.fact()), needle.fact().size());
  EXPECT_NE(answer(text, kSmallHeads, 3, {}, alone).text, needle.phrase);
}

TEST(Needle, AskedForAnotherNameThereIsNoPhrase) {
  const Needle needle = make_needle(1);
  std::string text = whole(hide(needle, prose(kTextSize), kTextSize, 50));
  text.erase(text.size() - needle.question.size());
  text += make_needle(2).question;
  EXPECT_NE(answer(text, kSmallHeads, 3, {}, alone).text, needle.phrase);
}

TEST(Needle, TheAnswerIsWhatTheTextSays) {
  const Needle needle = make_needle(1);
  std::string text = whole(hide(needle, prose(kTextSize), kTextSize, 50));
  text.replace(text.find(needle.phrase), needle.phrase.size(), "changed by hand");
  EXPECT_EQ(answer(text, kSmallHeads, 3, {}, alone).text, "changed by hand");
}

TEST(Needle, AnAnswerWithoutAnEndIsGivenUp) {
  const Needle needle = make_needle(1);
  std::string text = whole(hide(needle, prose(kTextSize), kTextSize, 50));
  const std::size_t quote = text.find(needle.phrase) + needle.phrase.size();
  const std::string endless = "so it goes on and on without any closing quote at all";
  text.replace(quote - needle.phrase.size(), needle.phrase.size() + 1, endless);
  EXPECT_EQ(answer(text, kSmallHeads, 3, {}, alone).text, endless.substr(0, kMaxAnswer));
}

TEST(Needle, AStopEndsIt) {
  std::stop_source stop;
  RunOptions run;
  run.stop_token = stop.get_token();
  const std::string text = whole(hide(make_needle(1), prose(kTextSize), kTextSize, 50));
  EXPECT_NO_THROW(answer(text, kSmallHeads, 3, run, alone));
  double seen = 0;
  EXPECT_THROW(answer(text, kSmallHeads, 3, run, alone,
                      [&](double share) {
                        seen = share;
                        if (share > 0.1) stop.request_stop();  // inside the prefill call
                      }),
               Cancelled);
  EXPECT_GT(seen, 0.1);
  EXPECT_THROW(answer(text, kSmallHeads, 3, run, alone), Cancelled);
}

TEST(Needle, HidesAtTheDepthAndKeepsTheContext) {
  const Needle needle = make_needle(4);
  const std::string haystack = prose(2000);
  for (const std::int64_t depth : {0, 25, 100}) {
    const std::string text = whole(hide(needle, haystack, 1500, depth));
    EXPECT_EQ(text.size(), 1500U);
    EXPECT_TRUE(text.ends_with(needle.question));
    const std::size_t rest = 1500 - needle.fact().size() - needle.question.size();
    EXPECT_EQ(text.find(needle.fact()), rest * static_cast<std::size_t>(depth) / 100);
  }
  EXPECT_THROW(hide(needle, haystack, 2100, 50), InvalidArgument);
  EXPECT_THROW(hide(needle, haystack, 50, 50), InvalidArgument);
  EXPECT_THROW(whole(hide(needle, needle.fact() + haystack, 2000, 50)), InvalidArgument);
  const Text text = hide(needle, haystack, 1500, 30);
  const std::string all = whole(text);
  for (std::int64_t begin = 0; begin < text.size; begin += 131) {
    const std::int64_t end = std::min<std::int64_t>(text.size, begin + 250);
    EXPECT_EQ(text.read(begin, end),
              all.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin)));
  }
}

TEST(InductionHeads, ScoreGrowsWithTheMatchAndTheFullMatchWins) {
  const std::string match = "abcdefghijklmnopqrstuvwx";  // 24 bytes
  std::string text;
  std::vector<std::size_t> after;  // keys that come after 0, 1, 2, 4, 8, 16 and 24 bytes of it
  for (const std::size_t length : {0, 1, 2, 4, 8, 16, 24}) {
    text += "0123456789ABCDEFGHIJKLMNOP" + match.substr(match.size() - length);
    after.push_back(text.size());
  }
  text += "!" + match;
  const HeadShape shape{4, 2, 128, DType::kFloat32};
  InductionHeads heads(shape, 11, static_cast<std::int64_t>(text.size()));
  heads.append(text);
  const TensorView q = heads.queries(3), k = heads.keys();
  ASSERT_EQ(k.sizes, (Dims{1, 2, static_cast<std::int64_t>(text.size()), 128}));
  std::vector<double> scores;  // of the last row, all heads together
  for (const std::size_t j : after) {
    double score = 0;
    for (std::int64_t head = 0; head < 4; ++head)
      for (std::int64_t d = 0; d < 128; ++d)
        score += core::load_float(core::element(q, 0, head, 2, d), q.dtype) *
                 core::load_float(core::element(k, 0, head / 2, static_cast<std::int64_t>(j), d),
                                  k.dtype);
    scores.push_back(score);
  }
  for (std::size_t i = 1; i < scores.size(); ++i) EXPECT_GT(scores[i], scores[i - 1]) << i;
  // The heads of a group count the slice of 24 or of 16 bytes twice, 22 and 21 dimensions wide.
  EXPECT_EQ(scores.back(), 4 * 128 + 2 * (22 + 21));
}

TEST_F(NeedleFiles, ReadsDirectoriesInTheOrderOfTheirNames) {
  write("b/2.txt", "two");
  write("b/1/x.bin", std::string("\0\xff", 2));
  write("a.txt", "one");
  fs::create_directory_symlink(folder_, folder_ / "b" / "loop");
  const auto read = [](const std::vector<std::string>& paths, std::int64_t bytes) {
    const Haystack haystack(paths, bytes, {});
    return haystack.text().read(0, bytes);
  };
  const Haystack all({folder_.string()}, 8, {});
  EXPECT_EQ(whole(all.text()), std::string("one\0\xfftwo", 8));
  EXPECT_EQ(all.text().read(2, 6), std::string("e\0\xfft", 4));
  EXPECT_EQ(all.files(), 3);
  EXPECT_EQ(all.skipped(), 0);
  EXPECT_EQ(read({folder_.string()}, 4), std::string("one\0", 4));
  for (const char* name : {"5", "2", "7", "0", "3", "6", "1", "4"})
    write(std::string("n/") + name, name);
  EXPECT_EQ(read({(folder_ / "n").string()}, 8), "01234567");
  EXPECT_EQ(read({write("c.txt", "three"), write("d.txt", "four")}, 7), "threefo");
}

TEST_F(NeedleFiles, AFileThatShrinksIsNamed) {
  const std::string file = write("shrinks.txt", "some text");
  const Haystack haystack({file}, 9, {});
  write("shrinks.txt", "some");
  try {
    haystack.text().read(2, 8);
    FAIL() << "expected an error";
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find(file), std::string::npos) << error.what();
  }
}

TEST_F(NeedleFiles, SaysWhatIsMissing) {
  const std::string file = write("short.txt", "short");
  try {
    const Haystack haystack({file}, 100, {});
    FAIL() << "expected an error";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(error.argument(), "FILES");
    EXPECT_NE(std::string(error.what()).find("100 bytes"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("5 bytes"), std::string::npos) << error.what();
  }
  try {
    const Haystack haystack({file + ".absent"}, 100, {});
    FAIL() << "expected an error";
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find(file + ".absent"), std::string::npos) << error.what();
  }
}

/// Runs `keyfold needle` and returns its exit code; `output` gets what it printed.
ExitCode run_tool(std::vector<std::string> args, std::string& output) {
  args.insert(args.begin(), "needle");
  Tool tool;
  tool.parse(std::move(args));
  testing::internal::CaptureStdout();
  const ExitCode code = tool.run({});
  output = testing::internal::GetCapturedStdout();
  return code;
}

TEST_F(NeedleFiles, TheCommandPassesAndDraws) {
  const std::string file = write("text", prose(16384));
  const fs::path plot = folder_ / "plot.svg";
  std::string output;
  EXPECT_EQ(
      run_tool({file, "--context", "2K,4K", "--depths", "20,80", "--json", "--plot", plot.string()},
               output),
      kOk);
  const auto json = nlohmann::json::parse(output);
  EXPECT_EQ(json["passed"], true);
  ASSERT_EQ(json["results"].size(), 4U);
  EXPECT_EQ(json["results"][3]["context"], 4096);
  EXPECT_EQ(json["results"][3]["depth_percent"], 80);
  EXPECT_EQ(json["results"][3]["answer"], json["results"][3]["expected"]);
  std::ifstream svg(plot);
  const std::string picture(std::istreambuf_iterator<char>(svg), {});
  EXPECT_NE(picture.find("4 of 4 found"), std::string::npos);
}

TEST_F(NeedleFiles, AWrongAnswerFails) {
  // Decoys that look like the fact to the heads (24 bytes), often enough to outvote it.
  const std::string question = make_needle(1).question;
  std::string text = prose(3000);
  for (int i = 0; i < 20; ++i)
    text += "x" + question.substr(question.size() - 24) + "decoydecoyde'\n";
  const std::string file = write("text", text + prose(4096));
  const fs::path plot = folder_ / "plot.svg";
  std::string output;
  EXPECT_EQ(
      run_tool({file, "--context", "4K", "--depths", "50", "--seed", "1", "--plot", plot.string()},
               output),
      kFailure);
  EXPECT_NE(output.find("FAIL"), std::string::npos) << output;
  EXPECT_NE(output.find("decoydecoyde"), std::string::npos) << output;
  EXPECT_NE(output.find("0 of 1 found"), std::string::npos) << output;
  std::ifstream svg(plot);
  const std::string picture(std::istreambuf_iterator<char>(svg), {});
  EXPECT_NE(picture.find("class='bad'"), std::string::npos);
}

TEST_F(NeedleFiles, NoPlotWithoutAResult) {
  const std::string file = write("text", "too short");
  std::string output;
  EXPECT_THROW(run_tool({file, "--plot", (folder_ / "plot.svg").string()}, output),
               InvalidArgument);
  testing::internal::GetCapturedStdout();
  EXPECT_FALSE(fs::exists(folder_ / "plot.svg"));
  EXPECT_THROW(run_tool({file, "--heads", "3"}, output), InvalidArgument);
  testing::internal::GetCapturedStdout();
  Tool tool;
  EXPECT_THROW(tool.parse({"needle", "--head-dim", "32"}), CLI::ParseError);
}

}  // namespace
}  // namespace keyfold::cli

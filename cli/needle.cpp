// keyfold needle: hides a fact in real text and lets attention find it.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <numeric>

#include "command.hpp"
#include "haystack.hpp"
#include "memory.hpp"
#include "needle_report.hpp"
#include "numbers.hpp"
#include "progress.hpp"
#include "team.hpp"

namespace keyfold::cli {
namespace {

constexpr const char* kDefaultText = "/usr/include";

class NeedleCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command =
        app.add_subcommand("needle", "Hide a fact in real text and let attention find it");
    command
        ->add_option("FILES", files_,
                     fmt::format("Text to hide it in: files, or directories with all in them "
                                 "(default: {})",
                                 kDefaultText))
        ->type_name("");
    add_lengths(*command, "--context", contexts_, {.min = 1024, .max = std::int64_t{1} << 40},
                "Bytes of text, each one a key and a value; several make several columns")
        ->default_str("128K");
    add_lengths(*command, "--depths", depths_, {.min = 0, .max = 100},
                "Where to hide the fact, in percent of the text")
        ->default_str("10,50,90");
    command->add_option("--dtype", dtype_, "Type of queries, keys and values")
        ->check(CLI::IsMember({"float32", "float16", "bfloat16"}))
        ->type_name("TYPE")
        ->capture_default_str();
    add_length(*command, "--heads", shape_.num_heads, {.min = 1, .max = 1024}, "Query heads");
    add_length(*command, "--kv-heads", shape_.num_kv_heads, {.min = 1, .max = 1024},
               "Key and value heads");
    add_length(*command, "--head-dim", shape_.head_dim,
               {.min = InductionHeads::kMinHeadDim, .max = 576}, "Dimensions of a head, 64 to 576");
    add_length(*command, "--seed", seed_, {.min = 0}, "Chooses the facts and the codes");
    command->add_flag(
        "--mpi", mpi_,
        "Spread the text over the ranks of this MPI job, each of which reads its part");
    plot_.add_to(*command, "Draw the depth x context heat map");
    run_.add_to(*command);
    command->footer(
        "The heads are built by hand (an induction head): a key stands for the last 24 bytes "
        "before "
        "it, a value for the byte that follows. A prefill call over the last 2048 positions asks "
        "\"The pass phrase of ... is '\"; its last row gives the first byte of the answer, and one "
        "call per byte the rest. 'time' is that of all attention calls. Exits with 1 if an answer "
        "is wrong.\n\nExamples:\n"
        "  keyfold needle\n"
        "  keyfold needle --context 8K,128K,1M --depths 0,25,50,75,100 --plot needle.svg\n"
        "  keyfold needle ~/books --dtype bfloat16 --chunk-size 4096 --json\n"
        "  mpirun -n 4 keyfold needle --mpi --context 1M");
    return command;
  }

  ExitCode run(const Context& context) override {
    const std::unique_ptr<Team> team = mpi_ ? mpi_team() : std::make_unique<Team>();
    try {
      return run(context, *team);
    } catch (...) {
      team->abort(std::current_exception());
      throw;
    }
  }

 private:
  ExitCode run(const Context& context, Team& team) {
    check(team);
    const bool speaks = team.rank() == 0;
    if (speaks) plot_.open();
    const std::vector<std::string> paths =
        files_.empty() ? std::vector<std::string>{kDefaultText} : files_;
    const Haystack haystack(paths, *std::max_element(contexts_.begin(), contexts_.end()),
                            context.stop_token);
    if (haystack.skipped() > 0 && speaks)
      fmt::print(stderr, "keyfold: {} files or directories could not be read\n",
                 haystack.skipped());

    const std::vector<NeedleResult> results = run_all(haystack, paths, context, team);
    const auto passed = std::count_if(results.begin(), results.end(),
                                      [](const NeedleResult& result) { return result.passed(); });
    const bool all = passed == static_cast<std::ptrdiff_t>(results.size());
    if (speaks) {
      plot_.write([&] { return heat_map(results, setting(results.front().answer, team)); });
      if (run_.json) {
        print_json(as_json(haystack, paths, results, all, team));
      } else {
        fmt::print("{} of {} found\n", passed, results.size());
      }
    }
    return all ? kOk : kFailure;
  }

  void check(const Team& team) {
    static const std::map<std::string, DType> kDTypes = {
        {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}};
    shape_.dtype = kDTypes.at(dtype_);
    if (shape_.num_heads % shape_.num_kv_heads != 0)
      throw InvalidArgument("--heads", fmt::format("expected a multiple of --kv-heads ({}), got {}",
                                                   shape_.num_kv_heads, shape_.num_heads));
    if (files_.empty() && !std::filesystem::exists(kDefaultText))
      throw InvalidArgument("FILES", fmt::format("expected files or directories with text, as "
                                                 "there is no {} here",
                                                 kDefaultText));
    const std::int64_t longest = *std::max_element(contexts_.begin(), contexts_.end());
    const std::int64_t needed = InductionHeads::cache_bytes(shape_, longest) / team.num_ranks();
    const std::int64_t available = memory_available();
    if (available > 0 && needed > available)
      throw RunError(
          ErrorCode::kOutOfMemory,
          fmt::format("--context {} needs {} for keys and values, {} are free; choose a "
                      "smaller --context, --head-dim, --kv-heads or a 16-bit --dtype",
                      short_length(longest), readable_bytes(needed), readable_bytes(available)));
  }

  std::vector<NeedleResult> run_all(const Haystack& haystack, const std::vector<std::string>& paths,
                                    const Context& context, Team& team) const {
    const auto seed = static_cast<std::uint64_t>(seed_);
    const RunOptions options = run_.options(context);
    const double all_bytes = static_cast<double>(depths_.size()) *
                             std::accumulate(contexts_.begin(), contexts_.end(), 0.0);
    double done_bytes = 0;
    const bool speaks = team.rank() == 0;
    ProgressBar bar(run_.wants_progress(context) && speaks, "needle");
    std::vector<NeedleResult> results;
    for (const std::int64_t length : contexts_) {
      for (const std::int64_t depth : depths_) {
        bar.set_label(fmt::format("needle, {} at {} %", short_length(length), depth));
        const Needle needle = make_needle(seed + results.size());
        const auto bytes = static_cast<double>(length);
        const Answer reply =
            answer(hide(needle, haystack.text(), length, depth), shape_, seed, options, team,
                   [&](double share) { bar.update((done_bytes + share * bytes) / all_bytes); });
        done_bytes += bytes;
        results.push_back({length, depth, needle.phrase, reply});
        bar.clear();
        if (run_.json || !speaks) continue;
        if (results.size() == 1)
          fmt::print("Text from {} (files read: {}), {}\n{}\n", fmt::join(paths, ", "),
                     haystack.files(), setting(reply, team), table_heading());
        fmt::print("{}\n", table_line(results.back()));
        std::fflush(stdout);
      }
    }
    return results;
  }

  std::string setting(const Answer& reply, const Team& team) const {
    return fmt::format("{}, {} query heads, {} key heads, head_dim {}, {} {}{}", dtype_,
                       shape_.num_heads, shape_.num_kv_heads, shape_.head_dim, reply.backend,
                       reply.kernel, mpi_ ? fmt::format(", {} ranks", team.num_ranks()) : "");
  }

  nlohmann::ordered_json as_json(const Haystack& haystack, const std::vector<std::string>& paths,
                                 const std::vector<NeedleResult>& results, bool all,
                                 const Team& team) const {
    auto list = nlohmann::ordered_json::array();
    for (const NeedleResult& result : results) list.push_back(cli::as_json(result));
    return {
        {"text", {{"paths", paths}, {"files", haystack.files()}, {"skipped", haystack.skipped()}}},
        {"ranks", team.num_ranks()},
        {"dtype", dtype_},
        {"num_heads", shape_.num_heads},
        {"num_kv_heads", shape_.num_kv_heads},
        {"head_dim", shape_.head_dim},
        {"seed", seed_},
        {"passed", all},
        {"results", list}};
  }

  std::vector<std::string> files_;
  std::vector<std::int64_t> contexts_{131072};
  std::vector<std::int64_t> depths_{10, 50, 90};
  std::string dtype_ = "float16";
  HeadShape shape_;
  std::int64_t seed_ = 1;
  bool mpi_ = false;
  PlotFlag plot_;
  RunFlags run_;
};

}  // namespace

std::unique_ptr<Command> needle_command() { return std::make_unique<NeedleCommand>(); }

}  // namespace keyfold::cli

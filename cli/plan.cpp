// keyfold plan: what a call of a shape will do, without its data.
#include <fmt/format.h>

#include <algorithm>

#include "call_flags.hpp"
#include "command.hpp"
#include "numbers.hpp"
#include "plan_plot.hpp"

namespace keyfold::cli {
namespace {

class PlanCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command = app.add_subcommand(
        "plan", "Show how a call would be cut into dispatches, and the memory it would take");
    shape_.add_to(*command);
    formula_.add_to(*command);
    run_.add_to(*command);
    plot_.add_to(*command, "Draw the chunks over the query x key plane");
    command->footer(
        "A paced plan is an estimate for the speed that the backend claims; the run measures each "
        "dispatch and adapts. Bits never depend on the plan.\n\nExamples:\n"
        "  keyfold plan --q-len 2048 --kv-len 1M --causal\n"
        "  keyfold plan --kv-len 128K --q-len 2K --chunk-size 32K --plot plan.svg");
    return command;
  }

  ExitCode run(const Context& context) override {
    const AttentionShape shape = shape_.shape();
    AttentionOptions options = formula_.options();
    options.run = run_.options(context);
    const Plan plan = keyfold::plan(shape, options);
    plot_.open();
    plot_.write([&] { return plot_plan(shape, options, plan); });
    if (run_.json)
      print_json(as_json(shape, plan));
    else
      print(shape, plan);
    return kOk;
  }

 private:
  void print(const AttentionShape& shape, const Plan& plan) const {
    fmt::print("shape      {}{}\n", shape_text(shape), formula_.text());
    fmt::print("backend    {}, kernel {}, splits of {} keys\n", plan.backend, plan.kernel,
               plan.split_len);
    fmt::print("dispatches {}{}, at most {} keys x {} rows each\n", plan.chunks.size(),
               plan.paced ? fmt::format(" (estimated for a budget of {:.4g} ms)", plan.budget_ms)
                          : " (below the threshold: one for each row block)",
               plan.keys_per_chunk, plan.rows_per_chunk);
    fmt::print("row blocks {} of {} rows\n", plan.num_row_blocks, plan.rows_per_block);
    fmt::print("memory     {} scratch, {} staging\n", readable_bytes(plan.scratch_bytes),
               readable_bytes(plan.staging_bytes));
    print_chunks(plan);
  }

  static void print_chunks(const Plan& plan) {
    constexpr std::size_t kShown = 8;
    fmt::print("\n{:>9}  {:>15}  {:>17}  {:>21}\n", "dispatch", "groups", "rows", "keys");
    const auto range = [](std::int64_t begin, std::int64_t end) {
      return fmt::format("{}..{}", begin, end);
    };
    for (std::size_t i = 0; i < std::min(plan.chunks.size(), kShown); ++i) {
      const ChunkBox& box = plan.chunks[i];
      fmt::print("{:>9}  {:>15}  {:>17}  {:>21}\n", i + 1, range(box.group_begin, box.group_end),
                 range(box.row_begin, box.row_end), range(box.key_begin, box.key_end));
    }
    if (plan.chunks.size() > kShown)
      fmt::print("{:>9}  {} more; --json lists all\n", "...", plan.chunks.size() - kShown);
  }

  nlohmann::ordered_json as_json(const AttentionShape& shape, const Plan& plan) const {
    auto chunks = nlohmann::ordered_json::array();
    for (const ChunkBox& box : plan.chunks)
      chunks.push_back({{"groups", {box.group_begin, box.group_end}},
                        {"rows", {box.row_begin, box.row_end}},
                        {"keys", {box.key_begin, box.key_end}}});
    return {{"shape", cli::as_json(shape)},
            {"formula", formula_.as_json()},
            {"backend", plan.backend},
            {"kernel", plan.kernel},
            {"split_len", plan.split_len},
            {"paced", plan.paced},
            {"budget_ms", plan.budget_ms},
            {"keys_per_chunk", plan.keys_per_chunk},
            {"rows_per_chunk", plan.rows_per_chunk},
            {"rows_per_block", plan.rows_per_block},
            {"num_row_blocks", plan.num_row_blocks},
            {"scratch_bytes", plan.scratch_bytes},
            {"staging_bytes", plan.staging_bytes},
            {"chunks", chunks}};
  }

  ShapeFlags shape_;
  FormulaFlags formula_;
  RunFlags run_;
  PlotFlag plot_;
};

}  // namespace

std::unique_ptr<Command> plan_command() { return std::make_unique<PlanCommand>(); }

}  // namespace keyfold::cli

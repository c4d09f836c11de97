#include "command.hpp"

#include <fmt/format.h>

#include <cstddef>
#include <span>

#include "numbers.hpp"

namespace keyfold::cli {

void RunFlags::add_to(CLI::App& command) {
  const std::string group = "How to run (no flag here changes a bit of the result)";
  command
      .add_option("--backend", backend,
                  "Backend by name, see 'keyfold devices' (default: the first that can; "
                  "KEYFOLD_BACKEND)")
      ->type_name("NAME")
      ->group(group);
  CLI::Option* budget =
      add_number(command, "--budget-ms", budget_ms, 0.1, 60000,
                 "Longest device time of one dispatch, in milliseconds (default: 100; "
                 "KEYFOLD_BUDGET_MS)")
          ->group(group);
  command
      .add_flag("--interactive", interactive, "The same as --budget-ms 8: keeps a display fluid")
      ->excludes(budget)
      ->group(group);
  add_length(command, "--chunk-size", chunk_size, {.min = 1},
             "Keys per dispatch (default: chosen from measured device time; KEYFOLD_CHUNK_SIZE)")
      ->group(group);
  add_length(command, "--chunk-threshold", chunk_threshold, {.min = 0},
             "Keys below which the budget is not applied (default: 0; KEYFOLD_CHUNK_THRESHOLD)")
      ->group(group);
  add_length(command, "--max-scratch-mb", max_scratch_mb, {.min = 1, .max = 1 << 30},
             "Most scratch memory, in MiB (default: 256; KEYFOLD_MAX_SCRATCH_MB)")
      ->group(group);
  add_length(command, "--threads", threads, {.min = 1, .max = 4096},
             "CPU threads (default: all that the process may use; KEYFOLD_NUM_THREADS)")
      ->group(group);
  command.add_flag("--no-progress", no_progress, "No progress bar, even on a terminal");
  command.add_flag("--json", json, "Print one JSON document on stdout instead of text");
}

RunOptions RunFlags::options(const Context& context) const {
  constexpr double kInteractiveMs = 8;
  RunOptions run;
  run.backend = backend;
  run.budget_ms = interactive ? std::optional(kInteractiveMs) : budget_ms;
  run.chunk_size = chunk_size;
  run.chunk_threshold = chunk_threshold;
  if (max_scratch_mb) run.max_scratch_bytes = *max_scratch_mb << 20;
  if (threads) run.num_threads = static_cast<int>(*threads);
  run.stop_token = context.stop_token;
  return run;
}

void check_stop(const std::stop_token& stop_token) {
  if (stop_token.stop_requested()) throw Cancelled("cancelled; nothing was written", {});
}

// Paths need not be UTF-8; what is not is replaced.
void print_json(const nlohmann::ordered_json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace));
}

nlohmann::ordered_json as_json(const Report& report) {
  return {{"backend", report.backend},
          {"kernel", report.kernel},
          {"dispatches", report.dispatches},
          {"longest_dispatch_ms", report.longest_dispatch_ms},
          {"elapsed_ms", report.elapsed_ms},
          {"scratch_bytes", report.scratch_bytes},
          {"staging_bytes", report.staging_bytes},
          {"recoveries", report.recoveries}};
}

void PlotFlag::add_to(CLI::App& command, const std::string& help) {
  command.add_option("--plot", path_, help + ", as an SVG file")->type_name("FILE");
}

void PlotFlag::open() {
  if (!path_.empty()) file_.emplace(path_);
}

void PlotFlag::write(const std::function<std::string()>& draw) {
  if (!file_) return;
  const std::string picture = draw();
  file_->write(std::as_bytes(std::span(picture)));
  file_->finish();
  file_->publish();
}

}  // namespace keyfold::cli

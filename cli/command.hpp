// What the commands of the tool share: their interface, the run flags and how they report.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <io/atomic_file.hpp>
#include <keyfold/attention.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <stop_token>
#include <string>

namespace keyfold::cli {

/// Exit codes of the tool.
enum ExitCode : int {
  kOk = 0,       ///< done
  kFailure = 1,  ///< the work itself failed: a wrong answer, a file, the device, Ctrl-C
  kUsage = 2,    ///< a flag, an argument or an environment value is wrong
};

/// Where a command runs.
struct Context {
  std::stop_token stop_token;  ///< set by Ctrl-C and SIGTERM
  bool terminal = false;       ///< stderr is a terminal, so a progress bar may be drawn
};

/// One subcommand. add_to() only declares flags, bound to members; run() does the work.
/// run() throws for what fails: InvalidArgument exits with kUsage, every other exception with
/// kFailure, and main() prints what() on stderr.
class Command {
 public:
  Command() = default;
  virtual ~Command() = default;
  Command(const Command&) = delete;
  Command& operator=(const Command&) = delete;

  /// Adds the subcommand to `app` and returns it.
  virtual CLI::App* add_to(CLI::App& app) = 0;
  /// Runs it after a successful parse.
  virtual ExitCode run(const Context& context) = 0;
};

std::unique_ptr<Command> attend_command();
std::unique_ptr<Command> needle_command();
std::unique_ptr<Command> plan_command();
std::unique_ptr<Command> bench_command();
std::unique_ptr<Command> devices_command();
std::unique_ptr<Command> store_command();

/// The flags of how to run, the same for every command that computes.
struct RunFlags {
  std::optional<std::string> backend;
  std::optional<double> budget_ms;
  bool interactive = false;
  std::optional<std::int64_t> chunk_size;
  std::optional<std::int64_t> chunk_threshold;
  std::optional<std::int64_t> max_scratch_mb;
  std::optional<std::int64_t> threads;
  bool json = false;
  bool no_progress = false;

  /// Declares them all.
  void add_to(CLI::App& command);
  /// The library's options, with the stop token and without a progress callback.
  RunOptions options(const Context& context) const;
  /// Whether a progress bar is wanted.
  bool wants_progress(const Context& context) const { return context.terminal && !no_progress; }
};

/// Throws Cancelled when the token is set; for the parts of a command that the library does not
/// run.
void check_stop(const std::stop_token& stop_token);

/// Prints a JSON document and a newline on stdout.
void print_json(const nlohmann::ordered_json& json);
/// How a call ran, for --json.
nlohmann::ordered_json as_json(const Report& report);

/// --plot FILE: a picture that is written when the work is done, into a file that is tried before.
class PlotFlag {
 public:
  void add_to(CLI::App& command, const std::string& help);
  /// Creates the temporary file, if a picture is wanted, so that a bad path fails before the work.
  void open();
  /// Writes what `draw` returns, if a picture is wanted; open() must have been called.
  void write(const std::function<std::string()>& draw);

 private:
  std::string path_;
  std::optional<io::AtomicFile> file_;
};

}  // namespace keyfold::cli

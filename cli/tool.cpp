#include "tool.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace keyfold::cli {

Tool::Tool()
    : app_("Exact attention over key sequences of any length, in dispatches that fit a time budget",
           "keyfold") {
  app_.set_version_flag("--version", "keyfold " KEYFOLD_VERSION);
  app_.require_subcommand(0, 1);  // none is refused by parse(), after words that are not known
  app_.set_help_flag("-h,--help", "Print this help and exit");
  app_.get_formatter()->column_width(30);
  app_.failure_message([](const CLI::App*, const CLI::Error& error) {
    return fmt::format("keyfold: {}\n", error.what());
  });
  app_.footer(
      "'keyfold COMMAND --help' explains a command. Lengths may be written as 128K or 1M "
      "(multiples of 1024).\nExit codes: 0 done, 1 the work failed, 2 a wrong argument.");
  for (auto make : {attend_command, needle_command, plan_command, bench_command, devices_command,
                    store_command}) {
    std::unique_ptr<Command> command = make();
    CLI::App* app = command->add_to(app_);
    entries_.push_back({std::move(command), app});
  }
}

void Tool::parse(std::vector<std::string> args) {
  std::reverse(args.begin(), args.end());  // CLI11 takes them from the back
  app_.parse(std::move(args));
  if (app_.get_subcommands().empty()) throw CLI::RequiredError("COMMAND");
}

ExitCode Tool::run(const Context& context) {
  for (const Entry& entry : entries_)
    if (entry.app->parsed()) return entry.command->run(context);
  return kUsage;
}

ExitCode Tool::explain(const CLI::ParseError& error) const {
  if (app_.exit(error) == 0) return kOk;
  std::string name = "keyfold";
  for (const Entry& entry : entries_)
    if (entry.app->parsed()) name += " " + entry.app->get_name();
  fmt::print(stderr, "Run '{} --help' for what it takes.\n", name);
  return kUsage;
}

}  // namespace keyfold::cli

// The whole command line: parse() and run() apart, so that parsing can be tested and fuzzed alone.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "command.hpp"

namespace keyfold::cli {

/// The tool `keyfold` and its commands.
class Tool {
 public:
  Tool();

  /// Reads the arguments, without the program's name. Throws CLI::ParseError (also for --help and
  /// --version) and InvalidArgument; runs nothing and touches no file.
  void parse(std::vector<std::string> args);
  /// Runs the command that was parsed.
  ExitCode run(const Context& context);
  /// Says what a parse threw, on stdout for --help and --version, else on stderr; the exit code.
  ExitCode explain(const CLI::ParseError& error) const;

 private:
  struct Entry {
    std::unique_ptr<Command> command;
    CLI::App* app;
  };
  CLI::App app_;
  std::vector<Entry> entries_;
};

}  // namespace keyfold::cli

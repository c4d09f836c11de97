// The entry point: signals, the command line, and every error as one message and an exit code.
#include <fmt/format.h>
#include <pthread.h>
#include <unistd.h>

#include <csignal>
#include <system_error>
#include <thread>

#include "tool.hpp"

namespace {

using namespace keyfold::cli;

/// A source that the first SIGINT or SIGTERM stops; the next one ends the process. Must run before
/// any thread starts, as threads inherit the blocked signals.
std::stop_source stop_on_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::stop_source stop;
  std::thread([signals, stop]() mutable {
    int signal = 0;
    sigwait(&signals, &signal);
    stop.request_stop();
    pthread_sigmask(SIG_UNBLOCK, &signals, nullptr);
    while (true) pause();
  }).detach();
  return stop;
}

ExitCode run(std::vector<std::string> args) {
  const std::stop_source stop = stop_on_signals();
  std::signal(SIGXFSZ, SIG_IGN);  // writing beyond a file size limit is then an error like others
  Tool tool;
  try {
    tool.parse(std::move(args));
    const ExitCode code = tool.run({stop.get_token(), isatty(STDERR_FILENO) == 1});
    if (std::fflush(stdout) != 0)
      throw std::system_error(errno, std::generic_category(), "standard output");
    return code;
  } catch (const CLI::ParseError& error) {
    return tool.explain(error);
  } catch (const keyfold::InvalidArgument& error) {
    fmt::print(stderr, "keyfold: {}\n", error.what());
    return kUsage;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "keyfold: out of memory; try a smaller shape or a machine with more\n");
    return kFailure;
  } catch (const std::exception& error) {
    fmt::print(stderr, "keyfold: {}\n", error.what());
    return kFailure;
  }
}

}  // namespace

int main(int argc, char** argv) { return run({argv + 1, argv + argc}); }

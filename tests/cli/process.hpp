// Runs the built tool as a user does and keeps what it said.
#pragma once

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../io/files.hpp"
#include "command.hpp"

namespace keyfold::cli::test {

using io::test::load;
using io::test::save;
using io::test::TemporaryFolder;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// What a run left.
struct Outcome {
  int code = -1;  // exit code; -1 when a signal ended it
  std::string out, err;
  nlohmann::json json() const { return nlohmann::json::parse(out); }
};

// A running tool.
class Process {
 public:
  // `env` is set on top of the caller's environment, cleared of KEYFOLD_ and MLX_SDPA_ settings.
  explicit Process(const std::vector<std::string>& args,
                   const std::map<std::string, std::string>& env = {},
                   const std::string& stdout_path = "", const std::string& stderr_path = "") {
    std::vector<std::string> words;
    std::istringstream command(KEYFOLD_TOOL);
    for (std::string word; std::getline(command, word, '|');)
      if (!word.empty()) words.push_back(word);
    words.insert(words.end(), args.begin(), args.end());

    std::vector<std::string> settings;
    for (char** entry = environ; *entry != nullptr; ++entry)
      if (std::string_view(*entry).find("SDPA") == std::string::npos &&
          !std::string_view(*entry).starts_with("KEYFOLD_"))
        settings.emplace_back(*entry);
    for (const auto& [name, value] : env) settings.push_back(name + "=" + value);

    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const std::string out = stdout_path.empty() ? folder_ / "out" : stdout_path;
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, out.c_str(), kWrite, 0600);
    const std::string err = stderr_path.empty() ? folder_ / "err" : stderr_path;
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, err.c_str(), kWrite, 0600);
    if (posix_spawnp(&pid_, words[0].c_str(), &actions, nullptr, pointers(words).data(),
                     pointers(settings).data()) != 0)
      throw std::runtime_error("cannot start " + words[0]);
    posix_spawn_file_actions_destroy(&actions);
  }

  void signal(int number) const { ::kill(pid_, number); }

  Outcome wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, load(folder_ / "out"),
            load(folder_ / "err")};
  }

 private:
  static constexpr int kWrite = O_WRONLY | O_CREAT | O_TRUNC;

  static std::vector<char*> pointers(std::vector<std::string>& words) {
    std::vector<char*> result;
    for (std::string& word : words) result.push_back(word.data());
    result.push_back(nullptr);
    return result;
  }

  TemporaryFolder folder_;
  pid_t pid_ = 0;
};

inline Outcome run(const std::vector<std::string>& args,
                   const std::map<std::string, std::string>& env = {}) {
  return Process(args, env).wait();
}

}  // namespace keyfold::cli::test

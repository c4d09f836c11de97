// Parses command lines, one argument per line; runs nothing.
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "tool.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::istringstream text(std::string(reinterpret_cast<const char*>(data), size));
  std::vector<std::string> args;
  for (std::string line; std::getline(text, line);) args.push_back(line);
  try {
    keyfold::cli::Tool().parse(std::move(args));
  } catch (const CLI::ParseError&) {  // the only thing that a wrong command line may throw
  }
  return 0;
}

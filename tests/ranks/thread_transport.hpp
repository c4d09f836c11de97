// Ranks that are threads of one process: strict about what they begin, and able to fall silent.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "keyfold/context_parallel.hpp"

namespace keyfold::test {

/// Thrown where a rank falls silent.
struct FellSilent {};

struct Silence {
  int rank = -1;         ///< none
  int after = 0;         ///< operations that it begins before
  bool in_done = false;  ///< the next one begins, and its done() throws
};

/// Runs `body` on so many threads, each with its ContextParallel, and gives what each threw, by
/// rank; null where it did not, FellSilent where it was told to.
std::vector<std::exception_ptr> on_ranks(int num_ranks,
                                         const std::function<void(ContextParallel&)>& body,
                                         const Silence& silence = {});

}  // namespace keyfold::test

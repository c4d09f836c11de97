// What this machine's CPU can do at most, measured: the yardstick of `keyfold bench`.
#pragma once

#include <cstdint>
#include <functional>

namespace keyfold::cli {

/// Measured limits of `num_threads` threads together.
struct Ceilings {
  double fma_gflops = 0;       ///< float32 multiply-adds in registers, 2 flops each
  double bfloat16_gflops = 0;  ///< the same of bfloat16 pairs; 0: no instruction for them
  double read_gbs = 0;         ///< sum over a buffer larger than the caches, 10^9 bytes per second
};

/// Measures them with the widest vectors of this CPU: the best of several runs, under two seconds
/// in all. Uses a buffer of 1 GiB, or of a quarter of the free memory where that is less. Calls
/// `between` before each run; what it throws passes through.
Ceilings measure_ceilings(int num_threads, const std::function<void()>& between);

/// Calls work(thread) for 0 to num_threads - 1, each on its own thread, all released together.
/// Returns the seconds from the first start to the last end.
double timed_on_threads(int num_threads, const std::function<void(int thread)>& work);

}  // namespace keyfold::cli

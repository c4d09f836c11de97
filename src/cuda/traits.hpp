// What a GPU says of itself, as far as keyfold asks.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/driver.hpp"

namespace keyfold::cuda {

struct Traits {
  static Traits of(const Driver& driver, CUdevice device);

  std::string name;
  int capability = 0;             ///< 10 * major + minor: 90 is Hopper
  std::int64_t memory_bytes = 0;  ///< 0 where the driver is too old to be asked
  int multiprocessors = 0;
  double bytes_per_second = 0;  ///< of its memory, by the data sheet; 0 where it does not say
  std::uint32_t max_shared_bytes = 0;  ///< of a block that asks for more than 48 KiB
  bool time_limit = false;             ///< the system ends kernels that run for long
  bool integrated = false;
};

}  // namespace keyfold::cuda

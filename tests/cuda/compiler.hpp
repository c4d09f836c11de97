// NVRTC for tests, which need no GPU and no driver.
#pragma once

#include <gtest/gtest.h>

#include <optional>

#include "cuda/nvrtc.hpp"
#include "keyfold/error.hpp"

namespace keyfold::cuda {

inline constexpr int kAnyDriver = 13999;  // that takes what every NVRTC makes

inline std::optional<Nvrtc> find_nvrtc() {
  try {
    return Nvrtc(kAnyDriver);
  } catch (const RunError&) {
    return std::nullopt;
  }
}

/// Gives the test an `nvrtc`, or skips it.
#define KEYFOLD_NEEDS_NVRTC()                      \
  const std::optional<Nvrtc> nvrtc = find_nvrtc(); \
  if (!nvrtc) GTEST_SKIP() << "NVRTC is ABSENT on this machine: nothing was tested"

}  // namespace keyfold::cuda

// Kernels loaded into a device, with a cache of their code on disk.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/driver.hpp"
#include "cuda/kernel.hpp"

namespace keyfold::cuda {

/// Code on disk: one file for each kernel, options, architecture, version of NVRTC, and of the
/// driver. Files are put in place whole; what cannot be read, or is not what was written, is made
/// anew. Used by all threads and processes at once.
class CodeCache {
 public:
  CodeCache(const Nvrtc& nvrtc, int driver_version, std::string target);

  /// From the disk, else compiled, which takes tenths of seconds to seconds, and kept there.
  std::vector<std::byte> get(const KernelSpec& spec) const;
  /// Where it is kept; empty where there is no folder.
  std::filesystem::path file(const KernelSpec& spec) const;

 private:
  std::string key(const KernelSpec& spec) const;

  const Nvrtc& nvrtc_;
  std::string versions_, target_;
};

class Modules {
 public:
  Modules(const Driver& driver, CUcontext context, const Nvrtc& nvrtc, int capability);
  ~Modules();
  Modules(const Modules&) = delete;
  Modules& operator=(const Modules&) = delete;

  /// The kernel, which is compiled at its first use. Throws Failure and RunError.
  CUfunction get(const KernelSpec& spec);

 private:
  const Driver& driver_;
  CUcontext context_;
  CodeCache cache_;
  std::mutex mutex_;
  std::map<std::string, std::pair<CUmodule, CUfunction>> loaded_;
};

}  // namespace keyfold::cuda

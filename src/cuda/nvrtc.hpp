// NVRTC, NVIDIA's compiler as a library, opened at run time. It needs neither a GPU nor headers.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/library.hpp"

namespace keyfold::cuda {

/// A file of source, by the name that #include has for it.
struct SourceFile {
  const char* name = nullptr;
  const char* text = nullptr;
};

class Nvrtc {
 public:
  /// The newest that a driver for this version of CUDA can load code of: looked for under its plain
  /// name, in CUDA_HOME and in /usr/local/cuda; KEYFOLD_NVRTC, a file or a folder, goes first.
  /// Throws RunError(kUnsupported) where there is none, and says what was looked for.
  explicit Nvrtc(int driver_version);

  /// As 1000 * major + 10 * minor.
  int version() const { return version_; }
  /// What compile() makes code for where the device has this compute capability (10 * major +
  /// minor): "sm_90a", or "compute_120", which the driver translates, where the device is newer
  /// than NVRTC.
  std::string target(int capability) const;

  /// Code for a target, and the compiler's log where it is wanted. Throws RunError(kDeviceFailure)
  /// with that log.
  std::vector<std::byte> compile(const SourceFile& source, const std::vector<SourceFile>& headers,
                                 const std::string& target, const std::vector<std::string>& options,
                                 std::string* log = nullptr) const;

 private:
  using Program = void*;  // nvrtcProgram
  using Result = int;

  bool open(const std::string& name, int driver_version);

  Library library_;
  int version_ = 0;
  std::vector<int> capabilities_;
  const char* (*error_string_)(Result) = nullptr;
  Result (*get_version_)(int*, int*) = nullptr;
  Result (*num_archs_)(int*) = nullptr;
  Result (*archs_)(int*) = nullptr;
  Result (*create_)(Program*, const char*, const char*, int, const char* const*,
                    const char* const*) = nullptr;
  Result (*destroy_)(Program*) = nullptr;
  Result (*compile_)(Program, int, const char* const*) = nullptr;
  Result (*cubin_size_)(Program, std::size_t*) = nullptr;
  Result (*cubin_)(Program, char*) = nullptr;
  Result (*ptx_size_)(Program, std::size_t*) = nullptr;
  Result (*ptx_)(Program, char*) = nullptr;
  Result (*log_size_)(Program, std::size_t*) = nullptr;
  Result (*log_)(Program, char*) = nullptr;
};

}  // namespace keyfold::cuda

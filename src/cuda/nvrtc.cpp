// Finding and calling NVRTC.
#include "cuda/nvrtc.hpp"

#include <algorithm>
#include <cstdlib>

#include "cuda/driver.hpp"
#include "keyfold/error.hpp"

namespace keyfold::cuda {
namespace {

constexpr int kMajors[] = {13, 12};

std::string library_name(int major) {
#ifdef _WIN32
  return "nvrtc64_" + std::to_string(major) + "0_0.dll";
#else
  return "libnvrtc.so." + std::to_string(major);
#endif
}

/// Where to look, in this order.
std::vector<std::string> candidates(int driver_version) {
  std::vector<std::string> folders;
  if (const char* home = std::getenv("CUDA_HOME")) folders.push_back(std::string(home) + "/lib64/");
  folders.emplace_back("/usr/local/cuda/lib64/");
  std::vector<std::string> all;
  const char* const own = std::getenv("KEYFOLD_NVRTC");
  if (own != nullptr) all.emplace_back(own);
  for (const int major : kMajors) {
    if (major > driver_version / 1000) continue;
    if (own != nullptr) all.push_back(std::string(own) + "/" + library_name(major));
    all.push_back(library_name(major));
    for (const std::string& folder : folders) all.push_back(folder + library_name(major));
  }
  return all;
}

}  // namespace

Nvrtc::Nvrtc(int driver_version) {
  std::string names;
  for (const std::string& name : candidates(driver_version)) {
    if (open(name, driver_version)) return;
    names += (names.empty() ? "" : ", ") + name;
  }
  throw RunError(ErrorCode::kUnsupported,
                 "NVRTC, which compiles the kernels, was not found for this driver (CUDA " +
                     version_text(driver_version) + "): looked for " + names +
                     "; install NVRTC (the CUDA toolkit, or pip install nvidia-cuda-nvrtc), and "
                     "name its file or folder in KEYFOLD_NVRTC where it is elsewhere");
}

bool Nvrtc::open(const std::string& name, int driver_version) {
  if (!library_.open(name)) return false;
  bool whole = true;
  const auto find = [&]<class Function>(Function& function, const char* symbol) {
    function = reinterpret_cast<Function>(library_.symbol(symbol));
    whole = whole && function != nullptr;
  };
  find(error_string_, "nvrtcGetErrorString");
  find(get_version_, "nvrtcVersion");
  find(num_archs_, "nvrtcGetNumSupportedArchs");
  find(archs_, "nvrtcGetSupportedArchs");
  find(create_, "nvrtcCreateProgram");
  find(destroy_, "nvrtcDestroyProgram");
  find(compile_, "nvrtcCompileProgram");
  find(cubin_size_, "nvrtcGetCUBINSize");
  find(cubin_, "nvrtcGetCUBIN");
  find(ptx_size_, "nvrtcGetPTXSize");
  find(ptx_, "nvrtcGetPTX");
  find(log_size_, "nvrtcGetProgramLogSize");
  find(log_, "nvrtcGetProgramLog");
  int major = 0, minor = 0, count = 0;
  if (!whole || get_version_(&major, &minor) != 0 || num_archs_(&count) != 0 || count < 1) {
    return false;
  }
  if (major > driver_version / 1000) return false;  // the driver would not load its code
  version_ = 1000 * major + 10 * minor;
  capabilities_.resize(static_cast<std::size_t>(count));
  return archs_(capabilities_.data()) == 0;
}

std::string Nvrtc::target(int capability) const {
  if (std::ranges::find(capabilities_, capability) != capabilities_.end()) {
    // Hopper's matrix units are in its own architecture only, which is no one's ancestor.
    return "sm_" + std::to_string(capability) + (capability == 90 ? "a" : "");
  }
  int best = 0;
  for (const int known : capabilities_)
    if (known < capability) best = std::max(best, known);
  if (best == 0) {
    throw RunError(ErrorCode::kUnsupported,
                   "NVRTC " + version_text(version_) + " makes no code for compute capability " +
                       std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }
  return "compute_" + std::to_string(best);
}

std::vector<std::byte> Nvrtc::compile(const SourceFile& source,
                                      const std::vector<SourceFile>& headers,
                                      const std::string& target,
                                      const std::vector<std::string>& options,
                                      std::string* log) const {
  std::vector<const char*> texts, names, all;
  for (const SourceFile& header : headers) {
    texts.push_back(header.text);
    names.push_back(header.name);
  }
  const std::string architecture = "--gpu-architecture=" + target;
  all.push_back(architecture.c_str());
  for (const std::string& option : options) all.push_back(option.c_str());
  const auto check = [&](Result result, const std::string& text = {}) {
    if (result == 0) return;
    throw RunError(ErrorCode::kDeviceFailure,
                   "NVRTC could not compile " + std::string(source.name) + " for " + target + ": " +
                       error_string_(result) + (text.empty() ? "" : "\n" + text));
  };

  struct Owner {  // of a program
    ~Owner() {
      if (program != nullptr) destroy(&program);
    }
    Result (*destroy)(Program*);
    Program program = nullptr;
  } owner{destroy_};
  check(create_(&owner.program, source.text, source.name, static_cast<int>(headers.size()),
                texts.data(), names.data()));
  const Result result = compile_(owner.program, static_cast<int>(all.size()), all.data());
  if (result != 0 || log != nullptr) {
    std::size_t length = 0;
    check(log_size_(owner.program, &length));
    std::string text(length, '\0');
    check(log_(owner.program, text.data()));
    text.resize(text.find_last_not_of('\0') + 1);
    check(result, text);
    *log = std::move(text);
  }
  const bool ptx = target.starts_with("compute_");
  std::size_t size = 0;
  check((ptx ? ptx_size_ : cubin_size_)(owner.program, &size));
  std::vector<std::byte> code(size);
  check((ptx ? ptx_ : cubin_)(owner.program, reinterpret_cast<char*>(code.data())));
  return code;
}

}  // namespace keyfold::cuda

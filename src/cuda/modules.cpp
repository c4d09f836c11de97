// Compiling, keeping and loading kernels.
#include "cuda/modules.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "gpu/disk_cache.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::uint32_t kDefaultShared = 48 << 10;  // that a launch may ask for without more ado

/// 64 bits of FNV-1a from a seed.
std::uint64_t hash(std::span<const std::byte> data, std::uint64_t seed) {
  std::uint64_t h = 14695981039346656037u ^ seed;
  for (const std::byte byte : data) h = (h ^ static_cast<std::uint64_t>(byte)) * 1099511628211u;
  return h ^ (h >> 29);
}
std::uint64_t hash(std::string_view text, std::uint64_t seed) {
  return hash(std::as_bytes(std::span(text)), seed);
}

std::string hex(std::uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (std::size_t i = 16; i-- > 0; value >>= 4) text[i] = kDigits[value & 15];
  return text;
}

/// What stands before the code in a file.
struct Header {
  std::array<char, 8> magic{'k', 'e', 'y', 'f', 'o', 'l', 'd', '1'};
  std::uint64_t key = 0, code = 0;  ///< their hashes
};

Header header_of(const std::string& key, std::span<const std::byte> code) {
  return {.key = hash(key, 2), .code = hash(code, 3)};
}

std::string joined(const KernelSpec& spec) {
  std::string text = spec.file + '\n' + spec.entry;
  for (const std::string& option : spec.options) text += '\n' + option;
  return text;
}

}  // namespace

CodeCache::CodeCache(const Nvrtc& nvrtc, int driver_version, std::string target)
    : nvrtc_(nvrtc),
      versions_(std::to_string(nvrtc.version()) + '\n' + std::to_string(driver_version)),
      target_(std::move(target)) {}

std::string CodeCache::key(const KernelSpec& spec) const {
  std::string text = versions_ + '\n' + target_ + '\n' + joined(spec) + '\n';
  text += kernel_source(spec.file).text;
  for (const SourceFile& header : kernel_headers()) text += header.text;
  return text;
}

std::filesystem::path CodeCache::file(const KernelSpec& spec) const {
  const std::filesystem::path folder = gpu::cache_folder();
  if (folder.empty()) return {};
  const std::string text = key(spec);
  return folder / ("cuda-" + hex(hash(text, 0)) + hex(hash(text, 1)) + ".bin");
}

std::vector<std::byte> CodeCache::get(const KernelSpec& spec) const {
  const std::filesystem::path place = file(spec);
  const std::string text = key(spec);
  if (!place.empty()) {
    std::vector<std::byte> data = gpu::read_file(place);
    if (data.size() > sizeof(Header)) {
      const Header wanted = header_of(text, std::span(data).subspan(sizeof(Header)));
      if (std::memcmp(data.data(), &wanted, sizeof wanted) == 0) {
        data.erase(data.begin(), data.begin() + sizeof(Header));
        return data;
      }
    }
  }
  std::vector<std::byte> code = compile(nvrtc_, spec, target_);
  if (!place.empty()) {
    const Header header = header_of(text, code);
    std::vector<std::byte> data(sizeof header + code.size());
    std::memcpy(data.data(), &header, sizeof header);
    std::memcpy(data.data() + sizeof header, code.data(), code.size());
    gpu::replace_file(place, data);
  }
  return code;
}

Modules::Modules(const Driver& driver, CUcontext context, const Nvrtc& nvrtc, int capability)
    : driver_(driver),
      context_(context),
      cache_(nvrtc, driver.version(), nvrtc.target(capability)) {}

Modules::~Modules() {
  if (driver_.ctx_push_current.quietly(context_) != CUDA_SUCCESS) return;
  for (const auto& [key, loaded] : loaded_) driver_.module_unload.quietly(loaded.first);
  CUcontext ignored = nullptr;
  driver_.ctx_pop_current.quietly(&ignored);
}

CUfunction Modules::get(const KernelSpec& spec) {
  const std::string key = joined(spec);
  const std::lock_guard lock(mutex_);
  if (const auto found = loaded_.find(key); found != loaded_.end()) return found->second.second;
  std::vector<std::byte> code = cache_.get(spec);
  code.push_back(std::byte{0});  // what the driver translates ends so
  const Scope scope(driver_, context_);
  std::pair<CUmodule, CUfunction>& made = loaded_[key];
  try {
    driver_.module_load_data(&made.first, static_cast<const void*>(code.data()));
    driver_.module_get_function(&made.second, made.first, spec.entry.c_str());
    if (spec.shared_bytes > kDefaultShared) {
      driver_.func_set_attribute(made.second, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                 static_cast<int>(spec.shared_bytes));
    }
    if (spec.clusters) {  // of more than 8 blocks
      driver_.func_set_attribute(made.second, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
                                 1);
    }
  } catch (...) {
    if (made.first != nullptr) driver_.module_unload.quietly(made.first);
    loaded_.erase(key);
    throw;
  }
  return made.second;
}

}  // namespace keyfold::cuda

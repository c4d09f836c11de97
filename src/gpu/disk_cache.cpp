// Reading, and writing by way of another name.
#include "gpu/disk_cache.hpp"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <string>
#include <system_error>

namespace keyfold::gpu {

namespace fs = std::filesystem;

fs::path cache_folder() {
  const auto variable = [](const char* name) -> fs::path {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (fs::path own = variable("KEYFOLD_CACHE_DIR"); !own.empty()) return own;
  if (const fs::path cache = variable("XDG_CACHE_HOME"); !cache.empty()) return cache / "keyfold";
  if (const fs::path home = variable("HOME"); !home.empty()) return home / ".cache" / "keyfold";
  return {};
}

std::vector<std::byte> read_file(const fs::path& file) {
  std::ifstream in(file, std::ios::binary | std::ios::ate);
  if (!in) return {};
  const std::streamoff size = in.tellg();
  if (size <= 0) return {};
  std::vector<std::byte> data(static_cast<std::size_t>(size));
  in.seekg(0);
  in.read(reinterpret_cast<char*>(data.data()), size);
  if (!in) return {};
  return data;
}

void replace_file(const fs::path& file, std::span<const std::byte> data) noexcept {
  static std::atomic<unsigned> count{0};  // threads write too
  try {
    fs::create_directories(file.parent_path());
    fs::path part = file;
    part += "." + std::to_string(getpid()) + "." + std::to_string(count++);
    std::ofstream out(part, std::ios::binary);
    out.write(reinterpret_cast<const char*>(data.data()),
              static_cast<std::streamsize>(data.size()));
    out.close();
    std::error_code failed;
    if (out) fs::rename(part, file, failed);
    if (!out || failed) fs::remove(part, failed);
  } catch (const std::exception&) {
    return;
  }
}

}  // namespace keyfold::gpu

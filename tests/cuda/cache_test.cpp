// Code on disk: found again, shared by processes, made anew when it is damaged.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "cuda/compiler.hpp"
#include "cuda/modules.hpp"
#include "gpu/disk_cache.hpp"

namespace keyfold::cuda {
namespace {

namespace fs = std::filesystem;

/// A folder of its own for the cache.
class Cache : public testing::Test {
 protected:
  Cache() : folder_(fs::temp_directory_path() / ("keyfold_cache_" + std::to_string(getpid()))) {
    setenv("KEYFOLD_CACHE_DIR", folder_.c_str(), 1);
  }
  ~Cache() override {
    fs::remove_all(folder_);
    unsetenv("KEYFOLD_CACHE_DIR");
  }

  static KernelSpec merge_kernel() {
    return {.file = "merge.cu",
            .entry = "merge",
            .options = {"--std=c++17", "-DKEYFOLD_THREADS=128", "-DKEYFOLD_DTYPE=0",
                        "-DKEYFOLD_HEAD_DIM=64", "-DKEYFOLD_VALUE_DIM=64", "-DKEYFOLD_MASK_TYPE=0",
                        "-DKEYFOLD_SOFTCAP=0", "-DKEYFOLD_SPLIT_LEN=512", "-DKEYFOLD_ROWS=2",
                        "-DKEYFOLD_LANES=64", "-DKEYFOLD_AHEAD=4"},
            .threads = 128};
  }
  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_), {}));
  }

  fs::path folder_;
};

TEST_F(Cache, KeepsCodeByAllThatItDependsOn) {
  KEYFOLD_NEEDS_NVRTC();
  const CodeCache cache(*nvrtc, 13000, "sm_80");
  const auto code = cache.get(merge_kernel());
  const fs::path file = cache.file(merge_kernel());
  ASSERT_TRUE(fs::exists(file));
  const auto time = fs::last_write_time(file);
  EXPECT_TRUE(cache.get(merge_kernel()) == code);
  EXPECT_EQ(fs::last_write_time(file), time);
  KernelSpec other = merge_kernel();
  other.options.back() = "-DKEYFOLD_AHEAD=32";
  EXPECT_NE(cache.file(other), file);
  EXPECT_NE(CodeCache(*nvrtc, 13000, "sm_90a").file(merge_kernel()), file);
  EXPECT_NE(CodeCache(*nvrtc, 12080, "sm_80").file(merge_kernel()), file);
  EXPECT_EQ(files(), 1U);
}

TEST_F(Cache, ADamagedFileIsMadeAnew) {
  KEYFOLD_NEEDS_NVRTC();
  const CodeCache cache(*nvrtc, 13000, "sm_80");
  const auto code = cache.get(merge_kernel());
  const fs::path file = cache.file(merge_kernel());
  const std::vector<std::byte> whole = gpu::read_file(file);
  for (const std::size_t kept : {std::size_t{0}, std::size_t{10}, whole.size() - 1}) {
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(whole.data()), static_cast<std::streamsize>(kept));
    EXPECT_TRUE(cache.get(merge_kernel()) == code) << kept;
    EXPECT_TRUE(gpu::read_file(file) == whole) << kept;
  }
  std::vector<std::byte> flipped = whole;
  flipped[whole.size() / 2] ^= std::byte{1};
  gpu::replace_file(file, flipped);
  EXPECT_TRUE(cache.get(merge_kernel()) == code);
  EXPECT_TRUE(gpu::read_file(file) == whole);
}

TEST_F(Cache, ProcessesFillItAtOnce) {
  KEYFOLD_NEEDS_NVRTC();
  std::vector<pid_t> children;
  for (int i = 0; i < 8; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      // With a compiler of its own, and again from the disk.
      const Nvrtc own(kAnyDriver);
      const CodeCache cache(own, 13000, "sm_80");
      const auto first = cache.get(merge_kernel());
      _exit(!first.empty() && cache.get(merge_kernel()) == first ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  EXPECT_EQ(files(), 1U);  // and nothing half-written beside it
}

TEST_F(Cache, NoFolderIsNoError) {
  KEYFOLD_NEEDS_NVRTC();
  setenv("KEYFOLD_CACHE_DIR", "/proc/keyfold", 1);  // where nothing can be made
  EXPECT_FALSE(CodeCache(*nvrtc, 13000, "sm_80").get(merge_kernel()).empty());
}

}  // namespace
}  // namespace keyfold::cuda

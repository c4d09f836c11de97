// Keys of four times the memory, or the address space, that the process may have.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "io/tensor_file.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

constexpr std::int64_t kAllowed = std::int64_t{32} << 20;
constexpr std::int64_t kHeads = 4, kRowDim = 64,
                       kLongLen = 4 * kAllowed / (2 * kHeads * kRowDim * 2);

/// A file of keys, with numbers here and there; the rest is zeros.
void make_file(const std::string& path, float first) {
  const std::string header = io::npy_header(DType::kFloat16, Dims{1, kHeads, kLongLen, kRowDim});
  save(path, header);
  const std::size_t bytes = kHeads * kLongLen * kRowDim * 2;
  std::filesystem::resize_file(path, header.size() + bytes);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  Tensor row(DType::kFloat16, {1, 1, 1, kRowDim});
  for (std::size_t at = 0; at < bytes; at += std::size_t{1} << 19) {
    row.fill([&] { return first += 0.01F; });
    file.seekp(static_cast<std::streamoff>(header.size() + at));
    file << text_of(row.bytes());
  }
}

void forget_pages(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY);
  ::fsync(file);
  ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  ::close(file);
}

bool write_line(const std::string& path, const std::string& line) {
  std::ofstream file(path);
  file << line;
  file.close();
  return !file.fail();
}

/// A group of this process alone that may have kAllowed bytes, page cache included.
class MemoryGroup {
 public:
  bool enter() {
    const std::string name = "/keyfold-test-" + std::to_string(::getpid());
    for (const auto& [root, limit, most] :
         {std::tuple("/sys/fs/cgroup/memory", "/memory.limit_in_bytes",
                     "/memory.max_usage_in_bytes"),
          {"/sys/fs/cgroup", "/memory.max", "/memory.peak"}}) {
      path_ = root + name;
      if (::mkdir(path_.c_str(), 0755) != 0) continue;
      most_ = path_ + most;
      root_ = root;
      if (write_line(path_ + limit, std::to_string(kAllowed)) &&
          write_line(path_ + "/cgroup.procs", std::to_string(::getpid()))) {
        return true;
      }
      ::rmdir(path_.c_str());
    }
    return false;
  }
  std::int64_t most() const {
    std::ifstream file(most_);
    std::int64_t bytes = 0;
    file >> bytes;
    return bytes;
  }
  void leave() const {
    write_line(root_ + "/cgroup.procs", std::to_string(::getpid()));
    ::rmdir(path_.c_str());
  }

 private:
  std::string path_, most_, root_;
};

enum class Limit { kMemoryGroup, kAddressSpace };
constexpr int kRight = 0, kWrong = 1, kNoLimit = 77;

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

/// Whether a truncation in the middle of the call is an error, and leaves the outputs alone.
bool truncation_is_found(const Call& call, KeyValueSource& source, const std::string& path) {
  Result result(call);
  AttentionOptions options = options_of(call, result);
  options.run.progress = [&](const Progress&) { std::filesystem::resize_file(path, 1 << 20); };
  try {
    scaled_dot_product_attention(call.q, source, result.out.mutable_view(), options);
    return false;
  } catch (const IoError& error) {
    fprintf(stderr, "%s\n", static_cast<const Error&>(error).what());
    return result.untouched();
  }
}

/// In a process of its own: the call over arrays without a limit, then that over files within it.
int attend_within(Limit limit) {
  const TemporaryFolder folder;
  const std::string k = folder / "k.npy", v = folder / "v.npy";
  make_file(k, -3);
  make_file(v, 2);
  Rng rng("beyond memory");
  bool right = true;
  for (const std::int64_t q_len : {1, 3}) {
    const Inputs q({.dtype = DType::kFloat16, .num_heads = kHeads, .q_len = q_len, .kv_len = 1},
                   rng);
    Call call{q.q.view(), {}, {}, {}};
    std::string expected;
    {
      const io::LoadedTensor keys = io::open_tensor(k), values = io::open_tensor(v);
      call.k = keys.view();
      call.v = values.view();
      expected = run_arrays(call);
    }
    forget_pages(k);
    forget_pages(v);
    MemoryGroup group;
    rlimit before{};
    if (limit == Limit::kMemoryGroup) {
      if (!group.enter()) return kNoLimit;
    } else {
      std::int64_t pages = 0;
      std::ifstream("/proc/self/statm") >> pages;
      ::getrlimit(RLIMIT_AS, &before);
      const auto now = static_cast<rlim_t>(pages * ::sysconf(_SC_PAGESIZE));
      const rlimit lower{now + static_cast<rlim_t>(kAllowed), before.rlim_max};
      if (::setrlimit(RLIMIT_AS, &lower) != 0) return kNoLimit;
      try {
        io::open_tensor(k), io::open_tensor(v);  // mapped as a whole
        fprintf(stderr, "the limit of the address space does not hold\n");
        right = false;
      } catch (const IoError&) {
      }
    }
    {
      SourceOptions how;
      how.ahead_bytes = 8 << 20;
      how.num_threads = 1;
      const auto source = open_source(k, v, Axes::kBHLD, how);
      right = right && run_source(call, *source) == expected;
      if (q_len == 3) right = right && truncation_is_found(call, *source, v);
    }
    if (limit == Limit::kMemoryGroup) {
      fprintf(stderr, "most memory %.1f MiB of %.1f\n",
              static_cast<double>(group.most()) / (1 << 20),
              static_cast<double>(kAllowed) / (1 << 20));
      right = right && group.most() <= kAllowed;
      group.leave();
    } else {
      ::setrlimit(RLIMIT_AS, &before);
    }
  }
  return right ? kRight : kWrong;
}

/// Runs it in a new process; gtest's own way starts this program again, before any thread.
void expect_right(Limit limit) {
  if (kSanitized) GTEST_SKIP() << "NOT TESTED: a sanitizer takes memory of its own";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  int code = -1;
  const auto keep = [&](int status) {
    code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return true;
  };
  EXPECT_EXIT(std::exit(attend_within(limit)), keep, "");
  if (code == kNoLimit) GTEST_SKIP() << "NOT TESTED: no right to limit the memory of a process";
  EXPECT_EQ(code, kRight);
}

TEST(Memory, KeysOfFourTimesAMemoryGroup) { expect_right(Limit::kMemoryGroup); }

TEST(Memory, KeysOfFourTimesTheAddressSpaceThatIsLeft) { expect_right(Limit::kAddressSpace); }

}  // namespace
}  // namespace keyfold::test

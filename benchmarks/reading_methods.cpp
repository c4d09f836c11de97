// Ways to read a file of keys piece by piece, ahead of their use, which here is a sum of all words
// on one thread. A piece is 16 MiB: 1 MiB of each of 16 heads. Rounds in turns, medians; CPU time
// of all threads. Arguments: a file of some GiB, larger than what is kept in memory otherwise,
// [rounds, 5]
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef KEYFOLD_WITH_LIBURING
#include <liburing.h>
#endif

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kPart = std::size_t{1} << 20, kParts = 16, kPiece = kPart * kParts;
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ

struct File {
  int buffered, direct;
  std::size_t pieces;
  std::size_t offset(std::size_t piece, std::size_t part) const {
    return (part * pieces + piece) * kPart;
  }
};

std::uint64_t sum(const char* data, std::size_t bytes) {
  std::uint64_t sums[8] = {};
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  for (std::size_t i = 0; i < bytes / 8; i += 8)
    for (std::size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
  std::uint64_t all = 0;
  for (const std::uint64_t s : sums) all += s;
  return all;
}

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

using Fill = std::function<void(std::size_t piece, char* buffer)>;  // of one thread

/// Threads fill four buffers, of huge pages or not, in turn; this one sums them in order.
std::uint64_t through_buffers(const File& file, int num_threads, bool huge,
                              const std::function<Fill()>& make_fill) {
  constexpr std::size_t kBuffers = 4;
  char* const buffers =
      static_cast<char*>(std::aligned_alloc(std::size_t{2} << 20, kBuffers * kPiece));
  if (huge) ::madvise(buffers, kBuffers * kPiece, MADV_HUGEPAGE);
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t next = 0, used = 0;
  std::vector<bool> ready(file.pieces);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&] {
      const Fill fill = make_fill();
      std::unique_lock lock(mutex);
      while (next < file.pieces) {
        const std::size_t piece = next++;
        changed.wait(lock, [&] { return piece < used + kBuffers; });
        lock.unlock();
        fill(piece, buffers + piece % kBuffers * kPiece);
        lock.lock();
        ready[piece] = true;
        changed.notify_all();
      }
    });
  }
  std::uint64_t all = 0;
  std::unique_lock lock(mutex);
  while (used < file.pieces) {
    changed.wait(lock, [&] { return ready[used]; });
    lock.unlock();
    all += sum(buffers + used % kBuffers * kPiece, kPiece);
    lock.lock();
    ++used;
    changed.notify_all();
  }
  lock.unlock();
  for (std::thread& thread : threads) thread.join();
  std::free(buffers);
  return all;
}

std::uint64_t by_pread(const File& file, int fd, int num_threads, bool huge = true) {
  return through_buffers(file, num_threads, huge, [&file, fd]() -> Fill {
    return [&file, fd](std::size_t piece, char* buffer) {
      for (std::size_t part = 0; part < kParts; ++part) {
        const auto at = static_cast<off_t>(file.offset(piece, part));
        if (::pread(fd, buffer + part * kPart, kPart, at) != static_cast<ssize_t>(kPart))
          fail("pread");
      }
    };
  });
}

#ifdef KEYFOLD_WITH_LIBURING
std::uint64_t by_uring(const File& file, int fd, unsigned depth) {
  return through_buffers(file, 1, true, [&file, fd, depth]() -> Fill {
    auto ring = std::make_shared<io_uring>();
    if (io_uring_queue_init(depth, ring.get(), 0) != 0) fail("io_uring_queue_init");
    return [&file, fd, depth, ring](std::size_t piece, char* buffer) {
      std::size_t asked = 0, done = 0;
      while (done < kParts) {
        for (; asked < kParts && asked - done < depth; ++asked) {
          io_uring_prep_read(io_uring_get_sqe(ring.get()), fd, buffer + asked * kPart, kPart,
                             file.offset(piece, asked));
        }
        io_uring_submit_and_wait(ring.get(), 1);
        io_uring_cqe* result = nullptr;
        for (; io_uring_peek_cqe(ring.get(), &result) == 0; ++done) {
          if (result->res != static_cast<int>(kPart)) fail("io_uring");
          io_uring_cqe_seen(ring.get(), result);
        }
      }
    };
  });
}
#endif

/// Mapped as a whole; with threads, they go ahead of the sum by up to four pieces.
std::uint64_t by_map(const File& file, int num_threads, int advice) {
  const std::size_t bytes = file.pieces * kPiece;
  char* const map =
      static_cast<char*>(::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.buffered, 0));
  if (map == MAP_FAILED) fail("mmap");
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t next = 0, used = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&] {
      std::unique_lock lock(mutex);
      while (next < file.pieces * kParts) {
        const std::size_t job = next++;
        changed.wait(lock, [&] { return job / kParts < used + 4; });
        lock.unlock();
        ::madvise(map + file.offset(job / kParts, job % kParts), kPart, advice);
        lock.lock();
      }
    });
  }
  std::uint64_t all = 0;
  for (std::size_t piece = 0; piece < file.pieces; ++piece) {
    for (std::size_t part = 0; part < kParts; ++part)
      all += sum(map + file.offset(piece, part), kPart);
    const std::lock_guard lock(mutex);
    used = piece + 1;
    changed.notify_all();
  }
  for (std::thread& thread : threads) thread.join();
  ::munmap(map, bytes);
  return all;
}

double cpu_seconds() {
  rusage used{};
  ::getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: reading_methods FILE [rounds]\n");
    return 2;
  }
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 5;
  struct stat status {};
  if (::stat(argv[1], &status) != 0) fail(argv[1]);
  const File file{::open(argv[1], O_RDONLY), ::open(argv[1], O_RDONLY | O_DIRECT),
                  static_cast<std::size_t>(status.st_size) / kPiece};
  struct Method {
    std::string name;
    std::function<std::uint64_t()> run;
  };
  const std::vector<Method> methods = {
      {"mapped", [&] { return by_map(file, 0, 0); }},
      {"mapped, WILLNEED ahead", [&] { return by_map(file, 1, MADV_WILLNEED); }},
      {"mapped, POPULATE_READ ahead x 4", [&] { return by_map(file, 4, kPopulateRead); }},
      {"pread x 1", [&] { return by_pread(file, file.buffered, 1); }},
      {"pread x 4", [&] { return by_pread(file, file.buffered, 4); }},
      {"pread, O_DIRECT x 4, small pages", [&] { return by_pread(file, file.direct, 4, false); }},
      {"pread, O_DIRECT x 4", [&] { return by_pread(file, file.direct, 4); }},
#ifdef KEYFOLD_WITH_LIBURING
      {"io_uring, depth 16", [&] { return by_uring(file, file.buffered, 16); }},
      {"io_uring, O_DIRECT, depth 16", [&] { return by_uring(file, file.direct, 16); }},
#endif
  };
  const double gb = static_cast<double>(file.pieces * kPiece) / 1e9;
  std::vector<std::vector<double>> rates(2 * methods.size()), cpu(2 * methods.size());
  std::uint64_t expected = 0;
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < 2 * methods.size(); ++i) {
      const bool cold = i < methods.size();
      if (cold) ::posix_fadvise(file.buffered, 0, 0, POSIX_FADV_DONTNEED);
      if (i == methods.size()) by_pread(file, file.buffered, 4);  // into the page cache
      const double cpu_before = cpu_seconds();
      const auto start = std::chrono::steady_clock::now();
      const std::uint64_t got = methods[i % methods.size()].run();
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      if (expected == 0) expected = got;
      if (got != expected) fail("another sum");
      rates[i].push_back(gb / time.count());
      cpu[i].push_back((cpu_seconds() - cpu_before) / gb);
    }
  }
  fmt::print("{:<34} {:>12} {:>12} {:>14} {:>12}\n", "medians", "disk, GB/s", "CPU s/GB",
             "cached, GB/s", "CPU s/GB");
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const std::size_t warm = i + methods.size();
    fmt::print("{:<34} {:>12.2f} {:>12.2f} {:>14.1f} {:>12.2f}\n", methods[i].name,
               median(rates[i]), median(cpu[i]), median(rates[warm]), median(cpu[warm]));
  }
  return 0;
}

// Attention over keys in files of four times the memory that the process may have, beside reading
// the same files alone and the same kernel over keys in memory; rounds in turns, medians.
// Arguments: a folder for the files, [GiB of keys and values, 4], [rounds, 5]
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#include "io/npy.hpp"
#include "keyfold/kv_store.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;

constexpr std::int64_t kHeads = 8, kDim = 128, kKeyBytes = 2 * kHeads * kDim * 2;
constexpr DType kType = DType::kFloat16;
const int kThreads = static_cast<int>(std::thread::hardware_concurrency());

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// k.npy, v.npy and keys.kv, of random keys that repeat.
void make_files(const std::filesystem::path& folder, std::int64_t keys) {
  const std::int64_t some = std::min<std::int64_t>(keys, 8192);
  const cli::RandomTensor tensor(kType, {1, kHeads, some, kDim}, 1, kThreads, {});
  const TensorView view = tensor.view();
  for (const char* name : {"k.npy", "v.npy"}) {
    std::ofstream file(folder / name, std::ios::binary);
    file << io::npy_header(kType, Dims{1, kHeads, keys, kDim});
    for (std::int64_t i = 0; i < kHeads * keys / some; ++i)
      file.write(static_cast<const char*>(view.data), some * kDim * 2);
  }
  std::filesystem::remove(folder / "keys.kv");
  KvStore store =
      KvStore::create(folder / "keys.kv", {1, kHeads, kDim, kDim, kType}, {}, Durability::kProcess);
  for (std::int64_t at = 0; at < keys; at += some) store.append(view, view);
  store.close();
  ::sync();
}

void forget_pages(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY);
  ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  ::close(file);
}

/// All bytes, by plain reads of 4 MiB on four threads.
void read_alone(const std::vector<std::string>& paths) {
  constexpr std::int64_t kBytes = 4 << 20;
  for (const std::string& path : paths) {
    const int file = ::open(path.c_str(), O_RDONLY);
    std::atomic<std::int64_t> next = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        std::vector<char> buffer(kBytes);
        while (::pread(file, buffer.data(), kBytes, kBytes * next++) > 0) {
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    ::close(file);
  }
}

/// All pieces, without computing.
void read_source(KeyValueSource& source) {
  source.seek(0, source.size());
  while (source.next().size() > 0) {
  }
  source.release();
}

/// Moves this process into a memory group of its own, or back to the first one.
bool limit_memory(std::int64_t bytes) {
  const std::string root = "/sys/fs/cgroup/memory", group = root + "/keyfold-benchmark";
  const auto write = [](const std::string& path, std::int64_t number) {
    std::ofstream file(path);
    file << number;
    file.close();
    return !file.fail();
  };
  if (bytes == 0) {
    write(root + "/cgroup.procs", ::getpid());
    return ::rmdir(group.c_str()) == 0;
  }
  ::mkdir(group.c_str(), 0755);
  return write(group + "/memory.limit_in_bytes", bytes) &&
         write(group + "/cgroup.procs", ::getpid());
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: beyond_memory FOLDER [GiB] [rounds]\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  const std::int64_t bytes = (argc > 2 ? std::atoll(argv[2]) : 4) << 30;
  const int rounds = argc > 3 ? std::atoi(argv[3]) : 5;
  const std::int64_t keys = bytes / kKeyBytes;
  const std::string k = folder / "k.npy", v = folder / "v.npy", store = folder / "keys.kv";
  fmt::print("{} keys, {:.1f} GiB of float16 k and v, {} key heads, head_dim {}; {} rounds\n", keys,
             static_cast<double>(bytes) / (1 << 30), kHeads, kDim, rounds);
  make_files(folder, keys);
  const bool limited = limit_memory(bytes / 4);
  fmt::print("memory of the process: {}\n",
             limited ? fmt::format("limited to {} MiB", bytes / 4 >> 20) : "NOT LIMITED");

  struct Shape {
    const char* name;
    std::int64_t num_heads, q_len;
  };
  const Shape shapes[] = {{"decode", 32, 1}, {"prefill", 32, 32}};
  std::map<std::string, std::vector<double>> rates;  // GB/s of keys and values
  const auto record = [&](const std::string& name, double gb, double seconds) {
    rates[name].push_back(gb / seconds);
  };
  const double all_gb = static_cast<double>(bytes) / 1e9;
  const std::int64_t some = std::min<std::int64_t>(keys, 32768);
  const cli::RandomTensor some_k(kType, {1, kHeads, some, kDim}, 2, kThreads, {});
  const cli::RandomTensor some_v(kType, {1, kHeads, some, kDim}, 3, kThreads, {});
  for (int round = 0; round < rounds; ++round) {
    for (const bool cold : {true, false}) {
      const std::string state = cold ? "disk" : "page cache";
      const auto prepare = [&](const std::vector<std::string>& paths) {
        // What another group of processes has read counts there: the page cache can be full of it.
        if (limited) limit_memory(0);
        for (const std::string& path : paths) forget_pages(path);
        if (!cold) read_alone(paths);
        if (limited) limit_memory(bytes / 4);
      };
      prepare({k, v});
      record(state + " alone, .npy", all_gb, seconds_of([&] { read_alone({k, v}); }));
      prepare({store});
      record(state + " alone, store", all_gb, seconds_of([&] { read_alone({store}); }));
      if (cold) {  // past the page cache, as a source reads what does not fit into it
        prepare({k, v});
        record(state + " source alone, .npy", all_gb,
               seconds_of([&] { read_source(*open_source(k, v)); }));
        prepare({store});
        record(state + " source alone, store", all_gb,
               seconds_of([&] { read_source(*KvStore::open(store).source()); }));
      }
      for (const Shape& shape : shapes) {
        const cli::RandomTensor q(kType, {1, shape.num_heads, shape.q_len, kDim}, 4, kThreads, {});
        const cli::RandomTensor out(kType, {1, shape.num_heads, shape.q_len, kDim}, 5, kThreads,
                                    {});
        const auto attend = [&](KeyValueSource& source, const std::string& what) {
          record(state + " " + shape.name + what, all_gb,
                 seconds_of([&] { scaled_dot_product_attention(q.view(), source, out.view()); }));
        };
        prepare({k, v});
        attend(*open_source(k, v), ", .npy");
        prepare({store});
        const std::unique_ptr<KeyValueSource> source = KvStore::open(store).source();
        attend(*source, ", store");
        attend(*source, ", store, again");
        const double gb = static_cast<double>(some * kKeyBytes) / 1e9;
        record(std::string("arrays ") + shape.name, gb, seconds_of([&] {
                 scaled_dot_product_attention(q.view(), some_k.view(), some_v.view(), out.view());
               }));
      }
    }
  }
  fmt::print("{:<28} {:>10} {:>8} {:>8} {:>10}\n", "median, GB/s of k and v", "rate", "least",
             "most", "of limit");
  for (const auto& [name, values] : rates) {
    std::string share;
    for (const Shape& shape : shapes) {
      const std::size_t at = name.find(shape.name);
      if (at == std::string::npos || name.starts_with("arrays")) continue;
      const std::string kind =
          name.find("npy") != std::string::npos ? "alone, .npy" : "alone, store";
      double alone = median(rates[name.substr(0, at) + kind]);
      const auto by_source = rates.find(name.substr(0, at) + "source " + kind);
      if (by_source != rates.end()) alone = std::max(alone, median(by_source->second));
      const double limit = std::min(alone, median(rates[std::string("arrays ") + shape.name]));
      share = fmt::format("{:.0f} %", 100 * median(values) / limit);
    }
    fmt::print("{:<28} {:>10.2f} {:>8.2f} {:>8.2f} {:>10}\n", name, median(values),
               *std::min_element(values.begin(), values.end()),
               *std::max_element(values.begin(), values.end()), share);
  }
  if (limited) limit_memory(0);
  for (const std::string& path : {k, v, store}) std::filesystem::remove(path);
  return 0;
}

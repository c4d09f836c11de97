// What a KvStore's calls take: opening, of any size; appending one key of 8 heads, head_dim 128,
// float16. Arguments: a folder, [GiB, 4]
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <optional>
#include <thread>
#include <vector>

#include "keyfold/kv_store.hpp"
#include "random_tensor.hpp"

namespace {

using namespace keyfold;

double median_ms(int times, const std::function<void()>& work) {
  std::vector<double> all;
  for (int i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    all.push_back(
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
            .count());
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: store_costs FOLDER [GiB]\n");
    return 2;
  }
  const std::string path = std::filesystem::path(argv[1]) / "costs.kv";
  const std::int64_t keys = (argc > 2 ? std::atoll(argv[2]) : 4) << 18, some = 8192;
  const int threads = static_cast<int>(std::thread::hardware_concurrency());
  const cli::RandomTensor tensor(DType::kFloat16, {1, 8, some, 128}, 1, threads, {});
  const TensorView view = tensor.view();
  TensorView one = view;
  one.sizes[2] = 1;
  std::filesystem::remove(path);
  std::optional<KvStore> store =
      KvStore::create(path, {1, 8, 128, 128, DType::kFloat16}, {}, Durability::kProcess);
  const auto start = std::chrono::steady_clock::now();
  for (std::int64_t at = 0; at < keys; at += some) store->append(view, view);
  const std::chrono::duration<double> filled = std::chrono::steady_clock::now() - start;
  const double gb = static_cast<double>(keys) * 4096 / 1e9;
  fmt::print("appended {:.1f} GB in pieces of {} keys: {:.2f} GB/s\n", gb, some,
             gb / filled.count());
  fmt::print("append one key, process: {:.3f} ms\n",
             median_ms(1000, [&] { store->append(one, one); }));
  fmt::print("open beside the writer:  {:.3f} ms\n", median_ms(50, [&] { KvStore::open(path); }));
  store.reset();
  fmt::print("open when closed:        {:.3f} ms\n", median_ms(50, [&] { KvStore::open(path); }));
  store = KvStore::append_to(path, Durability::kMachine);
  fmt::print("append one key, machine: {:.3f} ms\n",
             median_ms(100, [&] { store->append(one, one); }));
  const auto before = std::chrono::steady_clock::now();
  store->verify();
  const std::chrono::duration<double> verified = std::chrono::steady_clock::now() - before;
  fmt::print("verify:                  {:.2f} GB/s\n", gb / verified.count());
  // As a killed writer leaves it: a copy of the open file.
  std::filesystem::copy_file(path, path + ".copy",
                             std::filesystem::copy_options::overwrite_existing);
  fmt::print("open when not closed:    {:.3f} ms\n",
             median_ms(20, [&] { KvStore::open(path + ".copy"); }));
  store.reset();
  std::filesystem::remove(path);
  std::filesystem::remove(path + ".copy");
  return 0;
}

// Valid files with random damage: the readers must read or refuse them, and stay inside the file.
#include <random>

#include "files.hpp"
#include "io/npy.hpp"
#include "io/safetensors.hpp"

namespace keyfold::io::test {
namespace {

constexpr int kMutations = 4000;

// Changes, removes, inserts or repeats some bytes, mostly near the front, where the header is.
std::string mutate(std::string file, std::mt19937& random) {
  const auto below = [&](std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(random);
  };
  static constexpr std::string_view kTokens = "{}[](),:'\"0123456789-.eFBU<>|\\\xff";
  for (std::size_t i = below(4) + 1; i > 0 && !file.empty(); --i) {
    const std::size_t at = below(below(2) ? file.size() : std::min<std::size_t>(file.size(), 16));
    switch (below(5)) {
      case 0: file[at] = static_cast<char>(below(256)); break;
      case 1: file[at] = kTokens[below(kTokens.size())]; break;
      case 2: file.erase(at, below(8) + 1); break;
      case 3: file.insert(at, 1, kTokens[below(kTokens.size())]); break;
      case 4: file.insert(at, file.substr(at, below(16))); break;
    }
  }
  return file;
}

void expect_inside(const TensorLayout& tensor, std::span<const std::byte> file) {
  EXPECT_GE(tensor.data.data(), file.data());
  EXPECT_LE(tensor.data.data() + tensor.data.size(), file.data() + file.size());
}

TEST(Mutation, Npy) {
  std::mt19937 random(20240607);
  const std::string valid =
      npy_file("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", std::string(24, 'x'));
  int read = 0;
  for (int i = 0; i < kMutations; ++i) {
    const std::string file = mutate(valid, random);
    try {
      expect_inside(parse_npy("k.npy", bytes_of(file)), bytes_of(file));
      ++read;
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.argument(), "k.npy");
    }
  }
  EXPECT_GT(read, 0);
  EXPECT_LT(read, kMutations / 2);
}

TEST(Mutation, Safetensors) {
  std::mt19937 random(20240608);
  const std::string valid =
      safetensors_file("{\"__metadata__\":{\"a\":\"b\"}," + entry("q", "F32", "[2,3]", "[0,24]") +
                           "," + entry("k", "F16", "[4]", "[24,32]") + "}",
                       std::string(32, 'x'));
  int read = 0;
  for (int i = 0; i < kMutations; ++i) {
    const std::string file = mutate(valid, random);
    try {
      const SafetensorsIndex index("m", bytes_of(file));
      for (const auto& found : index.entries()) {
        expect_inside(index.find(found.name), bytes_of(file));
      }
      ++read;
    } catch (const InvalidArgument&) {
      continue;
    }
  }
  EXPECT_GT(read, 0);
  EXPECT_LT(read, kMutations / 2);
}

}  // namespace
}  // namespace keyfold::io::test

// Mapping, addressing and viewing of input files.
#include "io/tensor_file.hpp"

#include <sys/stat.h>

#include "files.hpp"
#include "keyfold/io_error.hpp"

namespace keyfold::io::test {
namespace {

using ::testing::ElementsAre;
using ::testing::ThrowsMessage;

std::string floats(const std::string& shape, const std::string& order, std::size_t count) {
  return npy_file("{'descr': '<f4', 'fortran_order': " + order + ", 'shape': " + shape + ", }",
                  std::string(4 * count, 'x'));
}

TEST(PathSpec, SplitsBehindSafetensors) {
  const auto expect = [](const std::string& spec, const std::string& path,
                         const std::string& tensor) {
    const PathSpec parts = parse_path_spec(spec);
    EXPECT_EQ(parts.path, path);
    EXPECT_EQ(parts.tensor, tensor);
  };
  expect("k.npy", "k.npy", "");
  expect("/a:b/k.npy", "/a:b/k.npy", "");
  expect("m.safetensors", "m.safetensors", "");
  expect("a:b/m.safetensors:layers.0:k", "a:b/m.safetensors", "layers.0:k");
  EXPECT_THAT([] { parse_path_spec("m.safetensors:"); }, throws_invalid("the name of a tensor"));
}

TEST(MappedFile, MapsMovesAndTakesEmptyFiles) {
  const TemporaryFolder folder;
  save(folder / "a", "hello");
  save(folder / "empty", "");
  MappedFile a(folder / "a");
  MappedFile b(std::move(a));
  EXPECT_EQ(b.bytes().size(), 5u);
  EXPECT_EQ(std::to_integer<char>(b.bytes()[4]), 'o');
  b = MappedFile(folder / "empty");
  EXPECT_TRUE(b.bytes().empty());
}

TEST(MappedFile, NamesPathAndReason) {
  const TemporaryFolder folder;
  const std::string missing = folder / "none.npy";
  EXPECT_THAT([&] { MappedFile file(missing); },
              ThrowsMessage<IoError>("cannot open " + missing + ": No such file or directory"));
  EXPECT_THAT([&] { MappedFile file(folder.path()); }, throws_invalid("regular file"));
  const std::string pipe = folder / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT([&] { MappedFile file(pipe); }, throws_invalid("regular file"));
}

TEST(OpenTensor, OutlivesTheCall) {
  const TemporaryFolder folder;
  const std::string path = folder / "k.npy";
  save(path, npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2)}",
                      data_of<float>({1.5F, -2.0F})));
  const LoadedTensor copy = [&] {
    LoadedTensor tensor = open_tensor(path);
    return tensor;
  }();
  const TensorView view = copy.view();
  const auto* data = static_cast<const float*>(view.data);
  EXPECT_EQ(data[0], 1.5F);
  EXPECT_EQ(data[1], -2.0F);
}

TEST(OpenTensor, ContentsDecideTheFormat) {
  const TemporaryFolder folder;
  const std::string path = folder / "m.safetensors";
  save(path, safetensors_file("{" + entry("q", "F16", "[1,2]", "[0,4]") + "," +
                                  entry("k", "F32", "[1,2]", "[4,12]") + "}",
                              std::string(12, 'x')));
  EXPECT_EQ(open_tensor(path + ":k").view().dtype, DType::kFloat32);
  EXPECT_EQ(open_tensor(path + ":q").view().dtype, DType::kFloat16);
  EXPECT_THAT([&] { open_tensor(path); }, throws_invalid("to say which tensor"));

  save(folder / "odd.name", floats("(1, 2)", "False", 2));
  EXPECT_EQ(open_tensor(folder / "odd.name").view().sizes[3], 2);
  save(path, floats("(1, 2)", "False", 2));
  EXPECT_THAT([&] { open_tensor(path + ":k"); }, throws_invalid("expected"));
  save(folder / "text.npy", "hello, this is text");
  EXPECT_THAT([&] { open_tensor(folder / "text.npy"); }, throws_invalid("got other contents"));
  save(folder / "empty.npy", "");
  EXPECT_THAT([&] { open_tensor(folder / "empty.npy"); }, throws_invalid("got an empty file"));
}

TEST(View, PlacesTwoToFourAxes) {
  const TemporaryFolder folder;
  const std::string path = folder / "k.npy";
  const auto view = [&](const std::string& shape, const std::string& order, std::size_t count) {
    save(path, floats(shape, order, count));
    return open_tensor(path).view();
  };
  TensorView v = view("(2, 3, 4, 5)", "False", 120);
  EXPECT_THAT(v.sizes, ElementsAre(2, 3, 4, 5));
  EXPECT_THAT(v.strides, ElementsAre(60, 20, 5, 1));
  v = view("(2, 3, 4, 5)", "True", 120);
  EXPECT_THAT(v.strides, ElementsAre(1, 2, 6, 24));
  v = view("(3, 4, 5)", "False", 60);
  EXPECT_THAT(v.sizes, ElementsAre(1, 3, 4, 5));
  EXPECT_THAT(v.strides, ElementsAre(60, 20, 5, 1));
  v = view("(4, 5)", "True", 20);
  EXPECT_THAT(v.sizes, ElementsAre(1, 1, 4, 5));
  EXPECT_THAT(v.strides, ElementsAre(20, 20, 1, 4));
  v = view("(0, 5)", "False", 0);
  EXPECT_THAT(v.sizes, ElementsAre(1, 1, 0, 5));

  EXPECT_THAT([&] { view("(5,)", "False", 5); }, throws_invalid("got 1 axes, [5]"));
  EXPECT_THAT([&] { view("()", "False", 1); }, throws_invalid("got 0 axes, []"));
  EXPECT_THAT([&] { view("(1, 1, 1, 1, 5)", "False", 5); }, throws_invalid(path));
}

TEST(OpenTensor, SmallFileThatClaimsTwoToTheSixtyElements) {
  const TemporaryFolder folder;
  const std::string npy = folder / "huge.npy";
  save(npy, floats("(1152921504606846976, 1)", "False", 4));
  EXPECT_THAT([&] { open_tensor(npy); }, throws_invalid(npy));
  const std::string safetensors = folder / "huge.safetensors";
  save(safetensors,
       safetensors_file(
           "{" + entry("k", "F32", "[1152921504606846976,1]", "[0,4611686018427387904]") + "}",
           std::string(64, 'x')));
  EXPECT_THAT([&] { open_tensor(safetensors); }, throws_invalid("within the 64 bytes of data"));
}

TEST(OpenTensor, FileLargerThanMemoryOpensAtOnce) {
  const TemporaryFolder folder;
  const std::string path = folder / "sparse.npy";
  constexpr std::int64_t kElements = std::int64_t{1} << 35;  // 128 GiB
  const std::string header = floats("(" + std::to_string(kElements / 128) + ", 128)", "False", 0);
  save(path, header);
  std::error_code error;
  std::filesystem::resize_file(path, header.size() + 4 * static_cast<std::uint64_t>(kElements),
                               error);
  if (error) GTEST_SKIP() << "no sparse files of 128 GiB here: " << error.message();
  const TensorView view = open_tensor(path).view();
  EXPECT_EQ(view.sizes[2], kElements / 128);
}

}  // namespace
}  // namespace keyfold::io::test

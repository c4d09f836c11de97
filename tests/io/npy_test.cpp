// The .npy reader against files written by hand.
#include "io/npy.hpp"

#include "files.hpp"

namespace keyfold::io::test {
namespace {

using ::testing::ElementsAre;

constexpr const char* kFloat23 = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";

std::string header(const std::string& descr, const std::string& order, const std::string& shape) {
  return "{'descr': " + descr + ", 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

auto parsing(const std::string& file) {
  return [file] { parse_npy("k.npy", bytes_of(file)); };
}

TEST(Npy, ReadsEveryVersionInPlace) {
  for (const int major : {1, 2, 3}) {
    const std::string file = npy_file(kFloat23, std::string(24, 'x'), major);
    const TensorLayout tensor = parse_npy("k.npy", bytes_of(file));
    EXPECT_EQ(tensor.dtype, DType::kFloat32);
    EXPECT_THAT(tensor.shape, ElementsAre(2, 3));
    EXPECT_THAT(tensor.strides, ElementsAre(3, 1));
    EXPECT_EQ(tensor.data.data(), bytes_of(file).data() + file.size() - 24);
    EXPECT_EQ(tensor.data.size(), 24u);
  }
}

TEST(Npy, ReadsEveryElementType) {
  const std::vector<std::tuple<std::string, DType, std::size_t>> types = {
      {"'<f4'", DType::kFloat32, 4},  {"'<f2'", DType::kFloat16, 2},
      {"'|b1'", DType::kBool, 1},     {"'<V2'", DType::kBFloat16, 2},
      {"'|V2'", DType::kBFloat16, 2}, {"'bfloat16'", DType::kBFloat16, 2}};
  for (const auto& [descr, dtype, size] : types) {
    const std::string file = npy_file(header(descr, "False", "(5,)"), std::string(5 * size, 'x'));
    EXPECT_EQ(parse_npy("k.npy", bytes_of(file)).dtype, dtype) << descr;
  }
}

TEST(Npy, FortranOrderBecomesStrides) {
  const std::string file = npy_file(header("'<f4'", "True", "(2, 3, 4)"), std::string(96, 'x'));
  EXPECT_THAT(parse_npy("k.npy", bytes_of(file)).strides, ElementsAre(1, 2, 6));
}

TEST(Npy, ReadsAnyOrderOfKeysQuotesAndSpaces) {
  const std::string file =
      npy_file("{\"shape\":(2,3) ,\t'fortran_order' :False,'descr':'<f4'}", std::string(24, 'x'));
  EXPECT_THAT(parse_npy("k.npy", bytes_of(file)).shape, ElementsAre(2, 3));
}

TEST(Npy, ReadsScalarsAndEmptyTensors) {
  const std::string scalar = npy_file(header("'<f4'", "False", "()"), "1234");
  EXPECT_TRUE(parse_npy("k.npy", bytes_of(scalar)).shape.empty());
  const std::string empty = npy_file(header("'<f4'", "False", "(4, 0, 8)"), "");
  const TensorLayout tensor = parse_npy("k.npy", bytes_of(empty));
  EXPECT_THAT(tensor.shape, ElementsAre(4, 0, 8));
  EXPECT_TRUE(tensor.data.empty());
}

TEST(Npy, WritesWhatNumpyWrites) {
  const Shape shape = {3};
  std::string expected = "\x93NUMPY\x01";
  expected += std::string("\0\x76\0", 3);
  expected += "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }";
  expected.append(127 - expected.size(), ' ');
  expected += '\n';
  EXPECT_EQ(npy_header(DType::kFloat32, shape), expected);
}

TEST(Npy, RefusesOtherElementTypes) {
  const auto with = [](const std::string& descr) {
    return parsing(npy_file(header(descr, "False", "(1,)"), std::string(8, 'x')));
  };
  EXPECT_THAT(with("'>f4'"), throws_invalid("got '>f4', big-endian"));
  EXPECT_THAT(with("'<f8'"), throws_invalid("k.npy: expected elements of little-endian float32"));
  EXPECT_THAT(with("'<i4'"), throws_invalid("got '<i4'"));
  EXPECT_THAT(with("'|O'"), throws_invalid("got '|O'"));
  EXPECT_THAT(with("''"), throws_invalid("got ''"));
  EXPECT_THAT(with("[('a', '<f4')]"), throws_invalid("got a structured array"));
}

TEST(Npy, RefusesEveryTruncation) {
  for (const int major : {1, 2}) {
    const std::string file = npy_file(kFloat23, std::string(24, 'x'), major);
    for (std::size_t size = 0; size < file.size(); ++size) {
      EXPECT_THAT(parsing(file.substr(0, size)), throws_invalid("k.npy: expected")) << size;
    }
  }
}

TEST(Npy, RefusesLeftOverData) {
  EXPECT_THAT(parsing(npy_file(kFloat23, std::string(25, 'x'))),
              throws_invalid("expected 24 bytes of data for shape [2, 3] of float32, got 25"));
}

TEST(Npy, RefusesLyingLengths) {
  const std::string magic = "\x93NUMPY";
  const std::string v1 = magic + '\1' + '\0';
  const std::string v2 = magic + '\2' + '\0';
  EXPECT_THAT(parsing(v1 + "\xff\xff{}"), throws_invalid("header of 65535 bytes"));
  EXPECT_THAT(parsing(v2 + "\xff\xff\xff\xff{}"), throws_invalid("header of 4294967295 bytes"));
  EXPECT_THAT(parsing(v1 + std::string("\0\0", 2)), throws_invalid("got its end"));
}

TEST(Npy, RefusesOtherVersionsAndContents) {
  EXPECT_THAT(parsing(npy_file(kFloat23, std::string(24, 'x'), 4)), throws_invalid("got 4.0"));
  EXPECT_THAT(parsing(npy_file(kFloat23, std::string(24, 'x'), 0)), throws_invalid("got 0.0"));
  EXPECT_THAT(parsing("PK\3\4 and so on"), throws_invalid("expected a .npy file"));
}

TEST(Npy, RefusesShapesThatLie) {
  const auto with = [](const std::string& shape) {
    return parsing(npy_file(header("'<f4'", "False", shape), std::string(24, 'x')));
  };
  EXPECT_THAT(with("(1152921504606846976,)"), throws_invalid("got 24"));  // 2^60
  EXPECT_THAT(with("(4294967296, 4294967296)"), throws_invalid("less than 2^63 bytes"));
  EXPECT_THAT(with("(4294967296, 0, 4294967296)"), throws_invalid("less than 2^63 bytes"));
  EXPECT_THAT(with("(9223372036854775808,)"), throws_invalid("fits in 64 bits"));
  EXPECT_THAT(with("(-2, -3)"), throws_invalid("extents of at least 0"));
  EXPECT_THAT(with("(2.0, 3)"), throws_invalid("expected ')'"));
  EXPECT_THAT(with("(2 3)"), throws_invalid("expected ')'"));
  EXPECT_THAT(with("(, )"), throws_invalid("an extent"));
  EXPECT_THAT(with("((2, 3))"), throws_invalid("an extent"));
  EXPECT_THAT(with("[2, 3]"), throws_invalid("expected '('"));
  EXPECT_THAT(with("6"), throws_invalid("expected '('"));
  std::string ones = "(";
  for (int i = 0; i < 33; ++i) ones += "1,";
  EXPECT_THAT(with(ones + ")"), throws_invalid("at most 32 axes"));
}

TEST(Npy, RefusesBrokenDictionaries) {
  const auto with = [](const std::string& text) { return parsing(npy_file(text, "")); };
  EXPECT_THAT(with(""), throws_invalid("expected '{'"));
  EXPECT_THAT(with("{}"), throws_invalid("a header that lacks one"));
  EXPECT_THAT(with("{'descr': '<f4', 'shape': (0,)}"), throws_invalid("a header that lacks one"));
  EXPECT_THAT(with("{'descr': '<f4', 'descr': '<f4'}"), throws_invalid("got 'descr'"));
  EXPECT_THAT(with("{'other': 1}"), throws_invalid("got 'other'"));
  EXPECT_THAT(with("{'descr"), throws_invalid("a closing quote"));
  EXPECT_THAT(with("{descr: '<f4'}"), throws_invalid("expected '''"));
  EXPECT_THAT(with("{'fortran_order': 1}"), throws_invalid("True or False"));
  EXPECT_THAT(with(header("'<f4'", "False", "(0,)") + " x"), throws_invalid("nothing after"));
  EXPECT_THAT(with(header("'<f4'", "False", "(0,)") + std::string(1, '\0')),
              throws_invalid("nothing after"));
}

TEST(Npy, RefusesMisalignedData) {
  std::string dictionary = kFloat23;
  dictionary.resize(61, ' ');
  const std::string file =
      std::string("\x93NUMPY\1") + '\0' + little_endian(61, 2) + dictionary + std::string(24, 'x');
  EXPECT_THAT(parsing(file), throws_invalid("a multiple of 4 bytes"));
  EXPECT_THAT(parsing(file), throws_invalid("got file offset 71"));
}

}  // namespace
}  // namespace keyfold::io::test

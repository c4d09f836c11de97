// The safetensors reader against files written by hand.
#include "io/safetensors.hpp"

#include "files.hpp"

namespace keyfold::io::test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::ThrowsMessage;

const std::string kTwo =
    "{" + entry("q", "F32", "[2,3]", "[0,24]") + "," + entry("k", "BF16", "[1,4]", "[24,32]") + "}";

auto finding(const std::string& file, const std::string& name = "") {
  return [=] { SafetensorsIndex("m.safetensors", bytes_of(file)).find(name); };
}

// A file of this header and `size` bytes of data.
auto reading(const std::string& header, std::size_t size) {
  return finding(safetensors_file(header, std::string(size, 'x')));
}

TEST(Safetensors, FindsTensorsInPlace) {
  const std::string file = safetensors_file(kTwo, std::string(32, 'x'));
  const SafetensorsIndex index("m.safetensors", bytes_of(file));
  const TensorLayout q = index.find("q");
  EXPECT_EQ(q.dtype, DType::kFloat32);
  EXPECT_THAT(q.shape, ElementsAre(2, 3));
  EXPECT_THAT(q.strides, ElementsAre(3, 1));
  EXPECT_EQ(q.data.data(), bytes_of(file).data() + file.size() - 32);
  const TensorLayout k = index.find("k");
  EXPECT_EQ(k.dtype, DType::kBFloat16);
  EXPECT_EQ(k.data.data(), q.data.data() + 24);
  EXPECT_EQ(k.data.size(), 8u);
}

TEST(Safetensors, ReadsEveryElementType) {
  const std::vector<std::tuple<std::string, DType, int>> types = {{"F32", DType::kFloat32, 4},
                                                                  {"F16", DType::kFloat16, 2},
                                                                  {"BF16", DType::kBFloat16, 2},
                                                                  {"BOOL", DType::kBool, 1}};
  for (const auto& [name, dtype, size] : types) {
    const std::string end = std::to_string(4 * size);
    const std::string file =
        safetensors_file("{" + entry("k", name, "[4]", "[0," + end + "]") + "}",
                         std::string(static_cast<std::size_t>(4 * size), 'x'));
    EXPECT_EQ(SafetensorsIndex("m", bytes_of(file)).find("").dtype, dtype) << name;
  }
}

TEST(Safetensors, AllowsMetadataScalarsAndEmptyTensors) {
  const std::string file = safetensors_file("{\"__metadata__\":{\"format\":\"pt\"}," +
                                                entry("none", "F32", "[0,8]", "[4,4]") + "," +
                                                entry("one", "F32", "[]", "[0,4]") + "}",
                                            "1234");
  const SafetensorsIndex index("m", bytes_of(file));
  EXPECT_EQ(index.entries().size(), 2u);
  EXPECT_TRUE(index.find("none").data.empty());
  EXPECT_TRUE(index.find("one").shape.empty());
}

TEST(Safetensors, NamesWhatThereIs) {
  const std::string file = safetensors_file(kTwo, std::string(32, 'x'));
  EXPECT_THAT(finding(file), throws_invalid("expected m.safetensors:TENSOR to say which tensor"));
  EXPECT_THAT(finding(file, "v"),
              throws_invalid("expected a tensor 'v'; it holds 2 tensors: 'q', 'k'"));
  std::string many = "{";
  for (int i = 0; i < 20; ++i) {
    many += (i ? "," : "") + entry("t" + std::to_string(10 + i), "F32", "[0]", "[0,0]");
  }
  EXPECT_THAT(finding(safetensors_file(many + "}", ""), "v"),
              ThrowsMessage<InvalidArgument>(AllOf(
                  HasSubstr("20 tensors: 't10'"), HasSubstr("'t17', ..."), Not(HasSubstr("t18")))));
  EXPECT_THAT(finding(safetensors_file("{}", "")), throws_invalid("it holds 0 tensors"));
}

TEST(Safetensors, RefusesOtherElementTypesOnlyWhenAskedFor) {
  const std::string file = safetensors_file(
      "{" + entry("q", "F32", "[2]", "[0,8]") + "," + entry("k", "F8_E4M3", "[4]", "[8,12]") + "}",
      std::string(12, 'x'));
  EXPECT_NO_THROW(finding(file, "q")());
  EXPECT_THAT(finding(file, "k"), throws_invalid("m.safetensors:k: expected elements of type F32, "
                                                 "F16, BF16 or BOOL, got 'F8_E4M3'"));
}

TEST(Safetensors, RefusesEveryTruncation) {
  const std::string file = safetensors_file(kTwo, std::string(32, 'x'));
  for (std::size_t size = 0; size < file.size(); ++size) {
    EXPECT_THAT(finding(file.substr(0, size), "q"), throws_invalid("m.safetensors: expected"))
        << size;
  }
}

TEST(Safetensors, RefusesLyingLengths) {
  const std::string rest = "{}" + std::string(100, ' ');
  EXPECT_THAT(finding(little_endian(103, 8) + rest),
              throws_invalid("got a length of 103 with 102"));
  EXPECT_THAT(finding(little_endian(~0ull, 8) + rest),
              throws_invalid("got a length of 18446744073709551615"));
  EXPECT_THAT(finding(little_endian(0, 8) + rest), throws_invalid("valid JSON"));
  const std::string large(kMaxSafetensorsHeader + 1, ' ');
  EXPECT_THAT(finding(little_endian(large.size(), 8) + "{" + large),
              throws_invalid("at most 100000000 bytes"));
}

TEST(Safetensors, RefusesOffsetsThatLie) {
  const auto one = [](const std::string& shape, const std::string& offsets) {
    return reading("{" + entry("k", "F32", shape, offsets) + "}", 24);
  };
  const auto two = [](const std::string& first, const std::string& second) {
    return reading(
        "{" + entry("a", "F32", "[3]", first) + "," + entry("b", "F32", "[3]", second) + "}", 24);
  };
  EXPECT_NO_THROW(one("[6]", "[0,24]")());
  EXPECT_THAT(one("[7]", "[0,28]"), throws_invalid("within the 24 bytes of data; got [0, 28]"));
  EXPECT_THAT(one("[6]", "[24,0]"), throws_invalid("begin at 0"));
  EXPECT_THAT(one("[5]", "[0,20]"), throws_invalid("expected 20 bytes of data"));
  EXPECT_THAT(one("[5]", "[4,24]"), throws_invalid("begin at 0"));
  EXPECT_THAT(one("[5]", "[0,24]"), throws_invalid("expected 20 bytes of data for shape [5]"));
  EXPECT_THAT(one("[6]", "[0,9223372036854775807]"), throws_invalid("within the 24 bytes"));
  EXPECT_THAT(one("[6]", "[-1,24]"), throws_invalid("the number -1"));
  EXPECT_THAT(one("[6]", "[0.0,24]"), throws_invalid("the number '0.0'"));
  EXPECT_THAT(one("[6]", "[0]"), throws_invalid("1 data_offsets"));
  EXPECT_THAT(one("[6]", "[0,24,24]"), throws_invalid("3 data_offsets"));
  EXPECT_THAT(two("[0,12]", "[8,24]"), throws_invalid("tensor 'b' to begin at 12"));  // overlap
  EXPECT_THAT(two("[0,8]", "[12,24]"), throws_invalid("tensor 'b' to begin at 8"));   // hole
  EXPECT_THAT(two("[0,12]", "[12,8]"), throws_invalid("got [12, 8]"));
  EXPECT_THAT(two("[0,24]", "[0,24]"), throws_invalid("tensor 'b' to begin at 24"));  // the same
}

TEST(Safetensors, RefusesShapesThatLie) {
  const auto with = [](const std::string& shape) {
    return reading("{" + entry("k", "F32", shape, "[0,24]") + "}", 24);
  };
  EXPECT_THAT(with("[1152921504606846976]"), throws_invalid("got 24"));  // 2^60
  EXPECT_THAT(with("[4294967296,4294967296]"), throws_invalid("less than 2^63 bytes"));
  EXPECT_THAT(with("[18446744073709551615]"), throws_invalid("the number 18446744073709551615"));
  EXPECT_THAT(with("[1e400]"), throws_invalid("expected a header"));
  EXPECT_THAT(with("[-6]"), throws_invalid("the number -6"));
  EXPECT_THAT(with("[\"6\"]"), throws_invalid("the text '6'"));
  EXPECT_THAT(with("6"), throws_invalid("the number 6"));
  EXPECT_THAT(with("null"), throws_invalid("got null"));
  std::string ones = "[1";
  for (int i = 0; i < 32; ++i) ones += ",1";
  EXPECT_THAT(with(ones + "]"), throws_invalid("at most 32"));
}

TEST(Safetensors, RefusesBrokenHeaders) {
  const std::string k = entry("k", "F32", "[0]", "[0,0]");
  EXPECT_THAT(reading("[]", 0), throws_invalid("other contents"));
  EXPECT_THAT(reading("{", 0), throws_invalid("valid JSON"));
  EXPECT_THAT(reading("{" + k + "}x", 0), throws_invalid("valid JSON"));
  EXPECT_THAT(reading("{" + k + "," + k + "}", 0), throws_invalid("its name twice at tensor 'k'"));
  EXPECT_THAT(reading("{\"k\":1}", 0), throws_invalid("the number 1 at tensor 'k'"));
  EXPECT_THAT(reading("{\"k\":true}", 0), throws_invalid("true or false"));
  EXPECT_THAT(reading("{\"k\":[0]}", 0), throws_invalid("a list"));
  EXPECT_THAT(reading("{\"k\":{}}", 0), throws_invalid("without dtype, shape or data_offsets"));
  EXPECT_THAT(reading("{\"k\":{\"dtype\":[1]}}", 0), throws_invalid("a list"));
  EXPECT_THAT(reading("{\"k\":{\"dtype\":{}}}", 0), throws_invalid("an object"));
  EXPECT_THAT(reading("{\"k\":{\"other\":0}}", 0), throws_invalid("the property 'other'"));
  EXPECT_THAT(reading("{\"k\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 0),
              throws_invalid("'dtype' twice"));
  EXPECT_THAT(reading("{\"__metadata__\":{\"a\":1}}", 0), throws_invalid("the number 1"));
  EXPECT_THAT(reading("{\"__metadata__\":{\"a\":{}}}", 0), throws_invalid("an object"));
  EXPECT_THAT(reading("{\"__metadata__\":\"a\"}", 0), throws_invalid("the text 'a'"));
  EXPECT_THAT(reading("{\"\xff\":1}", 0), throws_invalid("valid JSON"));
}

TEST(Safetensors, DeepAndLongHeadersEndAtOnce) {
  const std::string deep(100'000, '[');
  EXPECT_THAT(reading("{\"k\":" + deep, 0), throws_invalid("a list"));
  EXPECT_THAT(reading("{\"k\":{\"shape\":" + deep, 0), throws_invalid("a list"));
  std::string objects = "{\"__metadata__\":";
  for (int i = 0; i < 100'000; ++i) objects += "{\"k\":";
  EXPECT_THAT(reading(objects, 0), throws_invalid("an object"));
}

TEST(Safetensors, ErrorsHideControlCharacters) {
  EXPECT_THAT(reading("{\"\\u001b[2J\":1}", 0), throws_invalid("'?[2J'"));
  EXPECT_THAT(reading("{\"" + std::string(1000, 'n') + "\":1}", 0),
              throws_invalid("'" + std::string(80, 'n') + "...'"));
}

TEST(Safetensors, RefusesMisalignedData) {
  const std::string header =
      "{" + entry("m", "BOOL", "[3]", "[0,3]") + "," + entry("k", "F32", "[2]", "[3,11]") + "}";
  const std::string file = safetensors_file(header, std::string(11, 'x'));
  EXPECT_NO_THROW(finding(file, "m")());
  EXPECT_THAT(finding(file, "k"),
              throws_invalid("m.safetensors:k: expected its data at a multiple of 4 bytes"));
  EXPECT_THAT(finding(file, "k"),
              throws_invalid("got file offset " + std::to_string(file.size() - 8)));
}

}  // namespace
}  // namespace keyfold::io::test

// Reads and writes the .npy header, a Python dictionary such as
// {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
#include "io/npy.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <optional>
#include <string_view>

#include "keyfold/error.hpp"

namespace keyfold::io {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::size_t kVersionEnd = 8;  // magic, major, minor
constexpr std::size_t kAlignment = 64;  // of the data in the files that NumPy writes

struct NpyType {
  std::string_view descr;
  DType dtype;
};

// The first name of a type is the one that is written.
constexpr std::array<NpyType, 6> kNpyTypes = {{{"<f4", DType::kFloat32},
                                               {"<f2", DType::kFloat16},
                                               {"|b1", DType::kBool},
                                               {"<V2", DType::kBFloat16},
                                               {"|V2", DType::kBFloat16},
                                               {"bfloat16", DType::kBFloat16}}};

// Walks once over the dictionary. Nothing in it nests deeper than the shape's parentheses.
class HeaderParser {
 public:
  HeaderParser(const std::string& source, std::string_view text) : source_(source), text_(text) {}

  void parse() {
    expect('{');
    while (!accept('}')) {
      const std::string_view key = parse_string();
      expect(':');
      if (key == "descr" && !dtype_) {
        dtype_ = parse_dtype();
      } else if (key == "fortran_order" && !order_) {
        order_ = parse_order();
      } else if (key == "shape" && !shape_) {
        shape_ = parse_shape();
      } else {
        fail("each of 'descr', 'fortran_order' and 'shape' once", in_quotes(key));
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (position_ != text_.size()) fail("nothing after the dictionary");
    if (!dtype_ || !order_ || !shape_) {
      fail("the keys 'descr', 'fortran_order' and 'shape'", "a header that lacks one");
    }
  }

  DType dtype() const { return *dtype_; }
  Order order() const { return *order_; }
  const std::vector<std::int64_t>& shape() const { return *shape_; }

 private:
  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw InvalidArgument(source_, "expected " + expected + " in the .npy header, got " + got);
  }
  [[noreturn]] void fail(const std::string& expected) const {
    fail(expected,
         position_ < text_.size() ? in_quotes(text_.substr(position_)) : std::string("its end"));
  }

  void skip_space() {
    position_ = std::min(text_.find_first_not_of(" \t\r\n", position_), text_.size());
  }

  bool accept(std::string_view token) {
    skip_space();
    if (text_.substr(position_, token.size()) != token) return false;
    position_ += token.size();
    return true;
  }
  bool accept(char token) { return accept(std::string_view(&token, 1)); }

  void expect(char token) {
    if (!accept(token)) fail(fmt::format("'{}'", token));
  }

  std::string_view parse_string() {
    const char quote = accept('"') ? '"' : '\'';
    if (quote == '\'') expect('\'');
    const std::size_t end = text_.find(quote, position_);
    if (end == std::string_view::npos) fail("a closing quote");
    const std::string_view result = text_.substr(position_, end - position_);
    position_ = end + 1;
    return result;
  }

  DType parse_dtype() {
    skip_space();
    if (text_.substr(position_, 1) == "[") {
      throw InvalidArgument(source_, "expected an array of numbers, got a structured array");
    }
    const std::string_view descr = parse_string();
    for (const NpyType& type : kNpyTypes) {
      if (type.descr == descr) return type.dtype;
    }
    throw InvalidArgument(
        source_, fmt::format("expected elements of little-endian float32 '<f4', float16 '<f2', "
                             "bfloat16 '<V2' or bool '|b1', got {}{}",
                             in_quotes(descr), descr.substr(0, 1) == ">" ? ", big-endian" : ""));
  }

  Order parse_order() {
    if (accept("False")) return Order::kRowMajor;
    if (accept("True")) return Order::kColumnMajor;
    fail("'fortran_order' True or False");
  }

  std::vector<std::int64_t> parse_shape() {
    std::vector<std::int64_t> shape;
    expect('(');
    while (!accept(')')) {
      skip_space();
      std::int64_t extent = 0;
      const char* begin = text_.data() + position_;
      const auto [end, error] = std::from_chars(begin, text_.data() + text_.size(), extent);
      if (error != std::errc{}) fail("an extent that fits in 64 bits");
      position_ += static_cast<std::size_t>(end - begin);
      shape.push_back(extent);
      if (shape.size() > kMaxRank) fail(fmt::format("at most {} axes", kMaxRank), "more");
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return shape;
  }

  const std::string& source_;
  std::string_view text_;
  std::size_t position_ = 0;
  std::optional<DType> dtype_;
  std::optional<Order> order_;
  std::optional<std::vector<std::int64_t>> shape_;
};

}  // namespace

bool is_npy(std::span<const std::byte> file) {
  return file.size() >= kMagic.size() &&
         std::memcmp(file.data(), kMagic.data(), kMagic.size()) == 0;
}

TensorLayout parse_npy(const std::string& source, const FileHead& head) {
  const std::span<const std::byte> file = head.bytes;
  if (!is_npy(file)) throw InvalidArgument(source, "expected a .npy file, got other contents");
  const auto byte_at = [&](std::size_t i) {
    if (i >= file.size()) {
      throw InvalidArgument(
          source, fmt::format("expected a .npy header, got a file of {} bytes", head.size));
    }
    return std::to_integer<std::size_t>(file[i]);
  };

  const std::size_t major = byte_at(kMagic.size());
  const std::size_t minor = byte_at(kMagic.size() + 1);
  if (major < 1 || major > 3 || minor != 0) {
    throw InvalidArgument(
        source, fmt::format("expected .npy version 1.0, 2.0 or 3.0, got {}.{}", major, minor));
  }
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::size_t length = 0;
  for (std::size_t i = 0; i < length_bytes; ++i) length |= byte_at(kVersionEnd + i) << (8 * i);

  const std::size_t header_begin = kVersionEnd + length_bytes;
  if (length > file.size() - header_begin) {
    throw InvalidArgument(source, fmt::format("expected a header of {} bytes, as the file says, "
                                              "got {} bytes after its length",
                                              length, file.size() - header_begin));
  }
  const auto* text = reinterpret_cast<const char*>(file.data()) + header_begin;
  HeaderParser header(source, {text, length});
  header.parse();
  return make_layout(source, header.dtype(), header.shape(), header.order(), head,
                     header_begin + length, head.size);
}

std::string npy_header(DType dtype, std::span<const std::int64_t> shape) {
  std::string_view descr;
  for (const NpyType& type : kNpyTypes) {
    if (type.dtype == dtype && descr.empty()) descr = type.descr;
  }
  // Python writes a tuple of one element with a comma behind it.
  std::string dictionary =
      fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}", descr,
                  fmt::join(shape, ", "), shape.size() == 1 ? "," : "");
  const std::size_t before = kVersionEnd + 2;
  const std::size_t unpadded = before + dictionary.size() + 1;
  dictionary.append((kAlignment - unpadded % kAlignment) % kAlignment, ' ');
  dictionary += '\n';

  std::string header(kMagic);
  header += {'\1', '\0', static_cast<char>(dictionary.size() & 0xff),
             static_cast<char>(dictionary.size() >> 8)};
  return header + dictionary;
}

}  // namespace keyfold::io

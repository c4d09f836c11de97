// Reads and writes the safetensors header.
#include "io/safetensors.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>

#include "keyfold/error.hpp"

namespace keyfold::io {
namespace {

using Json = nlohmann::json;
using Entry = SafetensorsIndex::Entry;

constexpr std::size_t kLengthBytes = 8;
constexpr const char* kMetadata = "__metadata__";

struct SafetensorsType {
  std::string_view name;
  DType dtype;
};
constexpr std::array<SafetensorsType, 4> kSafetensorsTypes = {{{"F32", DType::kFloat32},
                                                               {"F16", DType::kFloat16},
                                                               {"BF16", DType::kBFloat16},
                                                               {"BOOL", DType::kBool}}};

// The header's length, which precedes it.
std::uint64_t header_length(std::span<const std::byte> file) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  return length;
}

// Takes the parser's events and ends it at the first one that the format does not allow, so that
// neither deep nesting nor long lists cost anything. Offsets count from the beginning of the data.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  explicit HeaderReader(const std::string& source) : source_(source) {}

  std::vector<Entry> read(const char* begin, const char* end) {
    Json::sax_parse(begin, end, this);
    return std::move(entries_);
  }

  bool start_object(std::size_t) override {
    if (depth_ > 1) fail("an object");
    if (depth_ == 1) entry_ = Entry{name_, "", {}, 0, 0};
    seen_.clear();
    ++depth_;
    return true;
  }
  bool end_object() override {
    if (--depth_ == 1 && name_ != kMetadata) {
      if (seen_.size() != 3) fail("a tensor without dtype, shape or data_offsets");
      entries_.push_back(std::move(entry_));
    }
    return true;
  }
  bool key(std::string& text) override {
    if (depth_ == 1) {
      name_ = text;
      if (!names_.insert(text).second) fail("its name twice");
    } else if (name_ != kMetadata) {
      property_ = text;
      if (text != "dtype" && text != "shape" && text != "data_offsets") {
        fail("the property " + in_quotes(text));
      }
      if (!seen_.insert(text).second) fail("the property " + in_quotes(text) + " twice");
    }
    return true;
  }
  bool string(std::string& text) override {
    if (depth_ == 2 && name_ == kMetadata) return true;
    if (depth_ != 2 || property_ != "dtype") fail("the text " + in_quotes(text));
    entry_.dtype = text;
    return true;
  }
  bool start_array(std::size_t) override {
    if (depth_ != 2 || name_ == kMetadata || property_ == "dtype") fail("a list");
    list_.clear();
    ++depth_;
    return true;
  }
  bool number_unsigned(std::uint64_t number) override {
    if (depth_ != 3 || list_.size() == kMaxRank || !std::in_range<std::int64_t>(number)) {
      fail(fmt::format("the number {}", number));
    }
    list_.push_back(static_cast<std::int64_t>(number));
    return true;
  }
  bool end_array() override {
    --depth_;
    if (property_ == "shape") {
      entry_.shape = list_;
    } else {
      if (list_.size() != 2) fail(fmt::format("{} data_offsets", list_.size()));
      entry_.begin = static_cast<std::size_t>(list_[0]);
      entry_.end = static_cast<std::size_t>(list_[1]);
    }
    return true;
  }
  bool null() override { fail("null"); }
  bool boolean(bool) override { fail("true or false"); }
  bool number_integer(std::int64_t number) override { fail(fmt::format("the number {}", number)); }
  bool number_float(double, const std::string& text) override {
    fail("the number " + in_quotes(text));
  }
  bool binary(Json::binary_t&) override { fail("binary data"); }
  bool parse_error(std::size_t, const std::string&, const Json::exception& error) override {
    throw InvalidArgument(source_,
                          "expected a header of valid JSON, got " + in_quotes(error.what()));
  }

 private:
  [[noreturn]] void fail(const std::string& got) const {
    throw InvalidArgument(
        source_, fmt::format("expected a header of the form {{name: {{dtype: text, shape: [extents "
                             "of 0 to 2^63-1, at most {}], data_offsets: [begin, end]}}}}, got {} "
                             "at tensor {}",
                             kMaxRank, got, in_quotes(name_)));
  }

  const std::string& source_;
  int depth_ = 0;  // containers that are open
  std::string name_, property_;
  std::set<std::string> names_, seen_;
  std::vector<std::int64_t> list_;
  Entry entry_;
  std::vector<Entry> entries_;
};

}  // namespace

bool is_safetensors(std::span<const std::byte> file) {
  return file.size() > kLengthBytes && file[kLengthBytes] == std::byte{'{'};
}

std::uint64_t safetensors_data_begin(std::span<const std::byte> head) {
  return kLengthBytes + header_length(head);
}

SafetensorsIndex::SafetensorsIndex(std::string source, const FileHead& file)
    : source_(std::move(source)), file_(file) {
  if (!is_safetensors(file.bytes)) {
    throw InvalidArgument(source_, "expected a safetensors file, got other contents");
  }
  const std::uint64_t length = header_length(file.bytes);
  const std::size_t after_length = file.size - kLengthBytes;
  if (length > kMaxSafetensorsHeader || length > file.bytes.size() - kLengthBytes) {
    throw InvalidArgument(
        source_, fmt::format("expected a header of at most {} bytes inside the file, got a length "
                             "of {} with {} bytes behind it",
                             kMaxSafetensorsHeader, length, after_length));
  }

  const auto* text = reinterpret_cast<const char*>(file.bytes.data()) + kLengthBytes;
  entries_ = HeaderReader(source_).read(text, text + length);
  std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });

  const std::size_t data_begin = kLengthBytes + static_cast<std::size_t>(length);
  const std::size_t data_size = file.size - data_begin;
  std::size_t covered = 0;
  for (Entry& entry : entries_) {
    if (entry.begin != covered || entry.end < entry.begin || entry.end > data_size) {
      throw InvalidArgument(
          source_, fmt::format("expected the data_offsets of tensor {} to begin at {}, where the "
                               "tensor before ends, and to end within the {} bytes of data; got "
                               "[{}, {}]",
                               in_quotes(entry.name), covered, data_size, entry.begin, entry.end));
    }
    covered = entry.end;
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  if (covered != data_size) {
    throw InvalidArgument(source_, fmt::format("expected {} bytes of data, the end of the last "
                                               "tensor; got {}",
                                               covered, data_size));
  }
}

std::string SafetensorsIndex::names() const {
  constexpr std::size_t kMost = 8;
  std::vector<std::string> shown;
  for (std::size_t i = 0; i < std::min(kMost, entries_.size()); ++i) {
    shown.push_back(in_quotes(entries_[i].name));
  }
  return fmt::format("it holds {} tensors: {}{}", entries_.size(), fmt::join(shown, ", "),
                     entries_.size() > kMost ? ", ..." : "");
}

TensorLayout SafetensorsIndex::find(const std::string& name) const {
  if (name.empty() && entries_.size() != 1) {
    throw InvalidArgument(source_,
                          "expected " + source_ + ":TENSOR to say which tensor; " + names());
  }
  const auto entry =
      name.empty() ? entries_.begin()
                   : std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& candidate) { return candidate.name == name; });
  if (entry == entries_.end()) {
    throw InvalidArgument(source_, "expected a tensor " + in_quotes(name) + "; " + names());
  }

  const std::string tensor = source_ + ":" + entry->name;
  const auto type = std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(),
                                 [&](const SafetensorsType& t) { return t.name == entry->dtype; });
  if (type == kSafetensorsTypes.end()) {
    throw InvalidArgument(
        tensor, "expected elements of type F32, F16, BF16 or BOOL, got " + in_quotes(entry->dtype));
  }
  return make_layout(tensor, type->dtype, entry->shape, Order::kRowMajor, file_, entry->begin,
                     entry->end);
}

std::string safetensors_header(const std::string& source, std::span<const NamedShape> tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::int64_t end = 0;
  for (const NamedShape& tensor : tensors) {
    if (tensor.name.empty() || tensor.name == kMetadata || header.contains(tensor.name)) {
      throw InvalidArgument(source,
                            "expected tensor names that differ, none of them empty or "
                            "'__metadata__'; got " +
                                in_quotes(tensor.name));
    }
    const auto type =
        std::find_if(kSafetensorsTypes.begin(), kSafetensorsTypes.end(),
                     [&](const SafetensorsType& t) { return t.dtype == tensor.dtype; });
    const std::int64_t begin = end;
    if (__builtin_add_overflow(end, byte_size(source, tensor.dtype, tensor.shape), &end)) {
      throw InvalidArgument(source, "expected tensors of less than 2^63 bytes in all, got more");
    }
    header[tensor.name] = {
        {"dtype", type->name}, {"shape", tensor.shape}, {"data_offsets", {begin, end}}};
  }

  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    throw InvalidArgument(source, "expected tensor names in UTF-8");
  }
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
  const std::uint64_t length = text.size();
  std::string result(kLengthBytes, '\0');
  std::memcpy(result.data(), &length, kLengthBytes);
  return result + text;
}

}  // namespace keyfold::io

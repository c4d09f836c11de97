// Layout, superblock, header and records of a store.
#include "store/format.hpp"

#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>

namespace keyfold::store {
namespace {

constexpr char kMagic[] = "KEYFLDKV";
constexpr std::uint64_t kVersion = 1;
constexpr std::int64_t kLengthBytes = 8;
constexpr std::int64_t kMostHeader = 100'000'000;  // that safetensors' own reader takes
constexpr std::int64_t kMostBytes = std::int64_t{1} << 60;

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

/// The superblock's fields, in this order behind the magic; then zeros; then the checksum.
struct Superblock {
  std::uint64_t version, dtype, batch, num_kv_heads, head_dim, value_dim, block_len, max_blocks,
      header_bytes, id;
};

std::string_view safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "F32";
    case DType::kFloat16: return "F16";
    case DType::kBFloat16: return "BF16";
    case DType::kBool: break;
  }
  throw InvalidArgument("dtype", "expected float32, float16 or bfloat16, got bool");
}

std::int64_t check(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value >= least && value <= most) return value;
  throw InvalidArgument(name, fmt::format("expected {} to {}, got {}", least, most, value));
}

/// Appends the header's entries of one block.
void add_block(std::string& text, const Layout& l, std::int64_t block) {
  const KeyValueShape& s = l.shape;
  const std::int64_t data = l.header_bytes;
  const auto entry = [&](const char* name, std::int64_t dim, std::int64_t begin,
                         std::int64_t bytes) {
    text += fmt::format(R"(,"{}.{}":{{"dtype":"{}","shape":[{},{},{},{}],"data_offsets":[{},{}]}})",
                        name, block, safetensors_name(s.dtype), s.batch, s.num_kv_heads,
                        l.block_len, dim, begin - data, begin - data + bytes);
  };
  entry("k", s.head_dim, l.k_begin(block), l.k_bytes());
  entry("v", s.value_dim, l.v_begin(block), l.v_bytes());
  text +=
      fmt::format(R"(,"log.{}":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}})", block,
                  l.log_bytes(), l.record_begin(block, 0) - data, l.block_begin(block + 1) - data);
}

std::string header_json(const Layout& l, std::optional<std::int64_t> keys) {
  std::string text = fmt::format(R"({{"__metadata__":{{"format":"keyfold.kv","keys":"{}"}})",
                                 keys ? std::to_string(*keys) : "open");
  if (keys) {
    text += fmt::format(R"(,"keyfold":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}})",
                        2 * kPageBytes);
    const std::int64_t blocks = (*keys + l.block_len - 1) / l.block_len;
    for (std::int64_t block = 0; block < blocks; ++block) add_block(text, l, block);
  }
  return text + "}";
}

std::span<const std::byte> row(const TensorView& t, std::int64_t batch, std::int64_t head,
                               std::int64_t begin, std::int64_t end) {
  const std::int64_t size = size_of(t.dtype);
  const auto* data = static_cast<const std::byte*>(t.data);
  return {data + (batch * t.strides[0] + head * t.strides[1] + begin * t.strides[2]) * size,
          static_cast<std::size_t>((end - begin) * t.sizes[3] * size)};
}

}  // namespace

struct Checksum::State {
  XXH3_state_t xxh;
};
Checksum::Checksum() : state_(std::make_unique<State>()) { XXH3_64bits_reset(&state_->xxh); }
Checksum::~Checksum() = default;
void Checksum::add(std::span<const std::byte> bytes) {
  XXH3_64bits_update(&state_->xxh, bytes.data(), bytes.size());
}
std::uint64_t Checksum::value() const { return XXH3_64bits_digest(&state_->xxh); }

std::uint64_t checksum_of(const TensorView& k, const TensorView& v, std::int64_t begin,
                          std::int64_t end) {
  Checksum checksum;
  for (const TensorView* t : {&k, &v}) {
    for (std::int64_t b = 0; b < t->sizes[0]; ++b) {
      for (std::int64_t h = 0; h < t->sizes[1]; ++h) checksum.add(row(*t, b, h, begin, end));
    }
  }
  return checksum.value();
}

Layout make_layout(const KeyValueShape& shape, const KvStoreOptions& options) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  constexpr std::int64_t kBlockBytes = std::int64_t{32} << 20;
  constexpr std::int64_t kLeastBlock = 512, kMostDefault = 65536;
  check("batch", shape.batch, 1, kMost);
  check("num_kv_heads", shape.num_kv_heads, 1, kMost);
  check("head_dim", shape.head_dim, 1, 576);
  check("value_dim", shape.value_dim, 1, 576);
  safetensors_name(shape.dtype);
  check("batch * num_kv_heads", shape.batch * shape.num_kv_heads, 1, kMost);

  Layout layout{.shape = shape};
  const auto best = static_cast<std::uint64_t>(
      std::clamp(kBlockBytes / layout.key_bytes(), kLeastBlock, kMostDefault));
  layout.block_len = options.block_len.value_or(static_cast<std::int64_t>(std::bit_floor(best)));
  check("block_len", layout.block_len, kLeastBlock, kMost);
  if (layout.block_len % kLeastBlock != 0) {
    throw InvalidArgument("block_len",
                          fmt::format("expected a multiple of 512, got {}", layout.block_len));
  }
  check("max_keys", options.max_keys, 1, kMostBytes / layout.key_bytes());
  layout.max_blocks = (options.max_keys + layout.block_len - 1) / layout.block_len;

  // The header of a full store is the longest. Its own size moves no offset in it.
  Layout last = layout;
  std::string entry;
  add_block(entry, last, layout.max_blocks);
  const std::int64_t fixed = static_cast<std::int64_t>(header_json(last, layout.block_len).size());
  const std::int64_t bytes =
      kLengthBytes + fixed + 32 + layout.max_blocks * static_cast<std::int64_t>(entry.size());
  if (bytes > kMostHeader) {
    throw InvalidArgument("max_keys",
                          fmt::format("expected blocks whose header takes at most {} bytes, got {} "
                                      "blocks of {} bytes each; make block_len larger",
                                      kMostHeader, layout.max_blocks, entry.size()));
  }
  layout.header_bytes = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  std::random_device random;
  layout.id = (std::uint64_t{random()} << 32) | random();
  return layout;
}

std::array<std::byte, kPageBytes> superblock_of(const Layout& l) {
  const auto u = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  const Superblock fields{kVersion,
                          static_cast<std::uint64_t>(l.shape.dtype),
                          u(l.shape.batch),
                          u(l.shape.num_kv_heads),
                          u(l.shape.head_dim),
                          u(l.shape.value_dim),
                          u(l.block_len),
                          u(l.max_blocks),
                          u(l.header_bytes),
                          l.id};
  std::array<std::byte, kPageBytes> page{};
  std::memcpy(page.data(), kMagic, 8);
  std::memcpy(page.data() + 8, &fields, sizeof fields);
  const std::uint64_t checksum = XXH3_64bits(page.data(), page.size() - 8);
  std::memcpy(page.data() + page.size() - 8, &checksum, 8);
  return page;
}

Layout read_layout(const File& file) {
  const auto refuse = [&](const std::string& got) {
    throw InvalidArgument(file.path(), "expected a store that keyfold made, got " + got);
  };
  std::uint64_t length = 0;
  file.read(0, std::as_writable_bytes(std::span(&length, 1)));
  const std::int64_t size = file.size();
  if (length > static_cast<std::uint64_t>(size)) refuse("other contents");
  std::array<std::byte, kPageBytes> page{};
  const std::int64_t begin = kLengthBytes + static_cast<std::int64_t>(length);
  file.read(begin, page);
  if (std::memcmp(page.data(), kMagic, 8) != 0) refuse("other contents");
  std::uint64_t checksum = 0;
  std::memcpy(&checksum, page.data() + page.size() - 8, 8);
  const std::uint64_t expected = XXH3_64bits(page.data(), page.size() - 8);
  if (checksum != expected) {
    throw InvalidArgument(file.path(),
                          fmt::format("expected checksum {:016x} of its superblock at byte {}, got "
                                      "{:016x}: it is damaged",
                                      expected, begin, checksum));
  }
  Superblock fields{};
  std::memcpy(&fields, page.data() + 8, sizeof fields);
  if (fields.version != kVersion) {
    refuse(fmt::format("one of version {}, where this knows version {}", fields.version, kVersion));
  }
  const auto i = [](std::uint64_t value) { return static_cast<std::int64_t>(value); };
  if (fields.dtype > static_cast<std::uint64_t>(DType::kBFloat16)) refuse("an unknown dtype");
  Layout layout{.shape = {i(fields.batch), i(fields.num_kv_heads), i(fields.head_dim),
                          i(fields.value_dim), static_cast<DType>(fields.dtype)},
                .block_len = i(fields.block_len),
                .max_blocks = i(fields.max_blocks),
                .header_bytes = i(fields.header_bytes),
                .id = fields.id};
  const Layout again = make_layout(
      layout.shape,
      {.block_len = layout.block_len, .max_keys = layout.max_blocks > 0 ? layout.max_keys() : 0});
  if (again.header_bytes != layout.header_bytes) refuse("a header of another length");
  return layout;
}

std::string header_text(const Layout& layout, std::optional<std::int64_t> keys) {
  const std::uint64_t length = static_cast<std::uint64_t>(layout.header_bytes - kLengthBytes);
  std::string text(kLengthBytes, '\0');
  std::memcpy(text.data(), &length, kLengthBytes);
  text += header_json(layout, keys);
  text.resize(static_cast<std::size_t>(layout.header_bytes), ' ');
  return text;
}

RecordBytes to_bytes(const Record& record, const Layout& layout) {
  const std::uint64_t fields[3] = {static_cast<std::uint64_t>(record.kind) | record.count << 32,
                                   record.first, record.checksum};
  const std::uint64_t check = XXH3_64bits_withSeed(fields, sizeof fields, layout.id);
  RecordBytes bytes;
  std::memcpy(bytes.data(), fields, sizeof fields);
  std::memcpy(bytes.data() + sizeof fields, &check, sizeof check);
  return bytes;
}

std::optional<Record> from_bytes(std::span<const std::byte, kRecordBytes> bytes,
                                 const Layout& layout) {
  std::uint64_t fields[4];
  std::memcpy(fields, bytes.data(), sizeof fields);
  if ((fields[0] | fields[1] | fields[2] | fields[3]) == 0) return Record{};
  if (XXH3_64bits_withSeed(fields, 24, layout.id) != fields[3]) return std::nullopt;
  return Record{static_cast<Record::Kind>(fields[0] & 0xffffffff), fields[0] >> 32, fields[1],
                fields[2]};
}

}  // namespace keyfold::store

// Damaged stores: every byte that matters is missed, by opening or by verify(), and its place
// named.
#include <filesystem>

#include "support.hpp"

namespace keyfold::test {
namespace {

constexpr KeyValueShape kDamagedShape{1, 2, 4, 3, DType::kFloat16};
constexpr std::int64_t kKeys = 700;

/// A closed store with one full block and one of 188 keys, and where its parts are.
class Damage : public testing::Test {
 protected:
  Damage() {
    KvStore store = KvStore::create(path, kDamagedShape, {.block_len = 512, .max_keys = 4096});
    for (const std::int64_t count : {500, 100, 50, 49, 1}) append_numbered(store, count);
    store.close();
    whole = load(path);
    std::uint64_t length = 0;
    std::memcpy(&length, whole.data(), 8);
    pages = 8 + length;
    blocks = pages + 8192;
  }
  struct Part {
    const char* name;
    std::size_t begin, end;
  };
  static constexpr std::size_t kLen = 512, kK = kLen * 2 * 4 * 2, kV = kLen * 2 * 3 * 2,
                               kLog = kLen * 32, kTwoRecords = 64, kLast = 188,
                               kBlock = kK + kV + kLog;

  /// Opens and verifies; the error, or "".
  std::string error_of(const std::string& contents) {
    save(path, contents);
    try {
      const KvStore store = KvStore::open(path);
      store.verify();
      EXPECT_EQ(store.size(), kKeys);
      expect_numbered(store, 0, kKeys);
      return {};
    } catch (const InvalidArgument& error) {
      EXPECT_EQ(error.argument(), path);
      return static_cast<const Error&>(error).what();
    }
  }

  TemporaryFolder folder;
  std::string path = folder / "chat.kv";
  std::string whole;
  std::size_t pages = 0, blocks = 0;
};

TEST_F(Damage, AFlippedBitIsFoundWhereverItMatters) {
  Rng rng("bits");
  ASSERT_EQ(error_of(whole), "");
  ASSERT_EQ(whole.size(), blocks + 2 * kBlock);
  // Of the second block each head has 188 keys.
  const std::size_t second = blocks + kBlock;
  const Part parts[] = {
      {"length", 0, 8},
      {"header", 8, pages},
      {"superblock", pages, pages + 4096},
      {"mark", pages + 4096, pages + 4096 + 32},
      {"keys", blocks, blocks + kK},
      {"values", blocks + kK, blocks + kK + kV},
      {"log", blocks + kK + kV, blocks + kK + kV + kTwoRecords},
      {"last keys", second, second + kLast * 4 * 2},
      {"last values", second + kK + kLen * 3 * 2, second + kK + (kLen + kLast) * 3 * 2},
      {"last log", second + kK + kV, second + kK + kV + 2 * kTwoRecords}};
  for (const Part& part : parts) {
    for (int n = 0; n < by_scale(2, 10, 40) && !HasFailure(); ++n) {
      const auto at = static_cast<std::size_t>(rng.between(
          static_cast<std::int64_t>(part.begin), static_cast<std::int64_t>(part.end) - 1));
      SCOPED_TRACE(testing::Message() << part.name << ", byte " << at);
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ 1 << rng.between(0, 7));
      const std::string error = error_of(damaged);
      EXPECT_NE(error, "");
      if (std::string_view(part.name).find("keys") != std::string_view::npos) {
        EXPECT_THAT(error, HasSubstr("expected checksum"));
        EXPECT_THAT(error, HasSubstr("of keys "));
      }
    }
  }
}

TEST_F(Damage, BytesThatAreNotUsedDoNotMatter) {
  std::string damaged = whole;
  damaged[blocks + kBlock + kLast * 4 * 2] = 'x';                  // behind the last key of a head
  damaged[pages + 4096 + 32] = 'x';                                // behind the mark
  damaged[blocks + kBlock + kK + kV + std::size_t{9} * 32] = 'x';  // a slot that is not reached
  EXPECT_EQ(error_of(damaged), "");
}

TEST_F(Damage, ATruncatedStoreIsRefused) {
  Rng rng("cuts");
  std::vector<std::size_t> sizes = {0, 7, 8, pages, pages + 4096, blocks, blocks + kBlock};
  for (int n = 0; n < by_scale(5, 20, 100); ++n) {
    sizes.push_back(
        static_cast<std::size_t>(rng.between(0, static_cast<std::int64_t>(whole.size()) - 1)));
  }
  for (const std::size_t size : sizes) {
    SCOPED_TRACE(testing::Message() << size << " of " << whole.size() << " bytes");
    EXPECT_NE(error_of(whole.substr(0, size)), "");
  }
  // The same while it is open, where nothing but the mark says how long it was.
  save(path, whole);
  {
    KvStore store = KvStore::append_to(path);
    append_numbered(store, 400);
    const std::string open = load(path);
    EXPECT_THAT(error_of(open.substr(0, blocks + kBlock)), HasSubstr("expected at least 700 keys"));
  }
}

TEST_F(Damage, ARecordOfAnotherStoreDoesNotCount) {
  const std::string other = folder / "other.kv";
  KvStore store = KvStore::create(other, kDamagedShape, {.block_len = 512, .max_keys = 4096});
  for (const std::int64_t count : {500, 100, 50, 49, 1}) append_numbered(store, count);
  store.close();
  std::string damaged = whole;
  damaged.replace(blocks, std::string::npos, load(other), blocks, std::string::npos);
  EXPECT_NE(error_of(damaged), "");
}

TEST_F(Damage, AStoreThatIsTruncatedWhileReadIsAnError) {
  save(path, whole);
  const KvStore store = KvStore::open(path);
  const auto source = store.source();
  std::filesystem::resize_file(path, blocks);
  EXPECT_THAT([&] { read_all(*source, 0, kKeys); },
              ThrowsMessage<IoError>(AllOf(HasSubstr("chat.kv"), HasSubstr("it was truncated"))));
  EXPECT_THAT([&] { store.verify(); }, ThrowsMessage<IoError>(HasSubstr("it was truncated")));
}

}  // namespace
}  // namespace keyfold::test

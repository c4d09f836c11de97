// A full disk: the store keeps what it had, and goes on when there is room again.
#include <sys/mount.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>

#include "support.hpp"

namespace keyfold::test {
namespace {

constexpr KeyValueShape kDiskShape{1, 2, 16, 16, DType::kFloat32};
constexpr KvStoreOptions kDiskOptions{.block_len = 512, .max_keys = 1 << 14};

/// Appends until one fails; the error.
std::string fill(KvStore& store, std::int64_t count) {
  for (;;) {
    const std::int64_t before = store.size();
    try {
      append_numbered(store, count);
    } catch (const IoError& error) {
      EXPECT_EQ(store.size(), before);
      return static_cast<const Error&>(error).what();
    }
  }
}

TEST(Disk, AFullDiskLosesNothing) {
  const TemporaryFolder folder;
  const std::string disk = folder / "disk";
  std::filesystem::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=2m") != 0) {
    GTEST_SKIP() << "no right to mount a small disk";
  }
  for (const std::int64_t count : {3, 100, 2000}) {  // the last of several blocks
    const std::string path = disk + "/chat.kv";
    save(disk + "/filler", std::string(1 << 20, 'x'));
    {
      KvStore store = KvStore::create(path, kDiskShape, kDiskOptions);
      EXPECT_THAT(fill(store, count), AllOf(HasSubstr("chat.kv"), HasSubstr("No space left")));
      const std::int64_t full = store.size();
      EXPECT_GT(full, 0);
      expect_numbered(store, 0, full);
      EXPECT_EQ(KvStore::open(path).size(), full);
      std::filesystem::remove(disk + "/filler");
      append_numbered(store, count);
      EXPECT_EQ(store.size(), full + count);
      fill(store, count);
    }
    const KvStore again = KvStore::open(path);
    EXPECT_TRUE(again.recovery().closed);
    expect_numbered(again, 0, again.size());
    again.verify();
    std::filesystem::remove(path);
  }
  EXPECT_THAT(
      [&] {
        KvStore::create(disk + "/large.kv", kDiskShape, {.block_len = 512, .max_keys = 1 << 24});
      },
      ThrowsMessage<IoError>(HasSubstr("No space left")));
  EXPECT_TRUE(std::filesystem::is_empty(disk)) << "nothing is left behind";
  ::umount(disk.c_str());
}

TEST(Disk, AFileSizeLimitIsTheSame) {
  const TemporaryFolder folder;
  KvStore store =
      KvStore::create(folder / "chat.kv", kDiskShape, kDiskOptions, Durability::kProcess);
  append_numbered(store, 500);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit limit{std::filesystem::file_size(folder / "chat.kv"), before.rlim_max};
  std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &limit);
  EXPECT_THAT(fill(store, 40), HasSubstr("File too large"));
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(store.size(), 500);
  append_numbered(store, 40);
  expect_numbered(store, 0, 540);
  store.close();
  EXPECT_EQ(KvStore::open(folder / "chat.kv").verify().records, 3);
}

}  // namespace
}  // namespace keyfold::test

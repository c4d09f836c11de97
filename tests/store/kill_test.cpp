// A writer that is killed, or loses the machine, at any point loses no append that was complete.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>

#include "io/mapped_file.hpp"
#include "io/safetensors.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

constexpr KeyValueShape kKilledShape{1, 2, 4, 3, DType::kFloat16};
constexpr KvStoreOptions kKilledOptions{.block_len = 512, .max_keys = 1 << 16};

/// What a writer has told before it was killed.
struct Shared {
  std::atomic<std::int64_t> complete = 0;  // keys of appends that returned
  std::atomic<std::int64_t> begun = 0;     // and of the one that was running
};

/// Appends until it is killed.
[[noreturn]] void write_until_killed(const std::string& path, std::uint64_t round, Shared& shared) {
  try {
    Rng rng("round " + std::to_string(round));
    KvStore store =
        KvStore::append_to(path, rng.one_in(4) ? Durability::kMachine : Durability::kProcess);
    for (;;) {
      const std::int64_t count = rng.pick<std::int64_t>({1, 1, 1, 7, 100, 600});
      const auto [k, v] = numbered(kKilledShape, store.size(), count);
      shared.begun = store.size() + count;
      store.append(k.view(), v.view());
      shared.complete = store.size();
      if (rng.one_in(60)) {
        store.close();
        store = KvStore::append_to(path, Durability::kProcess);
      }
    }
  } catch (const Error& error) {
    fprintf(stderr, "writer: %s\n", error.what());
  }
  ::_exit(1);
}

TEST(Kill, AThousandKillsLoseNothing) {
  Rng rng("kills");
  const int rounds = by_scale(20, 100, 1000);
  const TemporaryFolder folder;
  const std::string path = folder / "chat.kv";
  void* const memory =
      ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Shared& shared = *new (memory) Shared;
  KvStore::create(path, kKilledShape, kKilledOptions, Durability::kProcess);
  std::int64_t size = 0, reported = 0, reported_begun = 0, unclosed = 0;
  std::int64_t left = 0;  // where an append would have ended that nobody has cleared away yet
  for (int round = 0; round < rounds && !HasFailure(); ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    shared.complete = shared.begun = size;
    const pid_t writer = ::fork();
    if (writer == 0) write_until_killed(path, static_cast<std::uint64_t>(round), shared);
    ::usleep(static_cast<useconds_t>(rng.between(0, rng.one_in(4) ? 20000 : 4000)));
    ::kill(writer, SIGKILL);
    int status = 0;
    ::waitpid(writer, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the writer ended by itself";

    const std::int64_t complete = shared.complete, begun = shared.begun;
    const bool by_writer = rng.one_in(2);
    const KvStore store = by_writer ? KvStore::append_to(path) : KvStore::open(path);
    const RecoveryReport& report = store.recovery();
    // The append that was running is there as a whole, or not at all and then reported.
    EXPECT_TRUE(store.size() == complete || store.size() == begun)
        << store.size() << " of " << complete << " or " << begun;
    const std::int64_t would_end = store.size() + report.dropped_keys;
    EXPECT_LE(would_end, std::max(begun, left)) << "of " << size << ", complete " << complete;
    left = by_writer ? 0 : std::max(begun, left);
    EXPECT_EQ(report.dropped_bytes, report.dropped_keys * 2 * 7 * 2);
    EXPECT_TRUE(!report.closed || report.dropped_keys == 0);
    expect_numbered(store, size, store.size());
    EXPECT_EQ(store.verify().keys, store.size());
    size = store.size();
    reported += report.dropped_keys > 0;
    // In one block, where nothing but the record that it began tells of it.
    reported_begun += report.dropped_keys > 0 && size / 512 == (begun - 1) / 512;
    unclosed += !report.closed;
    if (size < 20000) continue;
    expect_numbered(store, 0, size);
    std::filesystem::remove(path);
    KvStore::create(path, kKilledShape, kKilledOptions, Durability::kProcess);
    size = 0;
  }
  RecordProperty("unfinished_appends_reported", static_cast<int>(reported));
  RecordProperty("unfinished_appends_of_one_block", static_cast<int>(reported_begun));
  RecordProperty("stores_not_closed", static_cast<int>(unclosed));
  if (scale() == Scale::kFull) {
    EXPECT_GT(reported, rounds / 50) << "kills should meet appends";
    EXPECT_GT(reported_begun, rounds / 25);
    EXPECT_GT(unclosed, rounds / 2);
  }
  ::munmap(memory, sizeof(Shared));
}

/// What a disk may hold when the machine ends: of each page that was written since the last sync,
/// the old or the new.
std::string mixed(std::string before, std::string after, Rng& rng) {
  constexpr std::size_t kPage = 4096;
  before.resize(after.size());
  const std::int64_t odds = rng.between(1, 5);
  for (std::size_t at = 0; at < after.size(); at += kPage) {
    if (rng.one_in(odds)) after.replace(at, kPage, before, at, kPage);
  }
  return after;
}

/// Where a store's mark is.
std::size_t mark_of(const std::string& store) {
  std::uint64_t length = 0;
  std::memcpy(&length, store.data(), 8);
  return 8 + length + 4096;
}

TEST(Kill, LostPagesOfTheLastBlockLoseNoSyncedAppend) {
  Rng rng("pages");
  for (int round = 0; round < by_scale(10, 50, 150) && !HasFailure(); ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const TemporaryFolder folder;
    const std::string path = folder / "chat.kv", crashed = folder / "crashed.kv";
    KvStore::create(path, kKilledShape, kKilledOptions, Durability::kProcess);
    std::int64_t synced = 0;
    std::string before;
    {
      KvStore store = KvStore::append_to(path, Durability::kMachine);
      append_numbered(store, rng.between(1, 700));
      synced = store.size();
      before = load(path);
    }
    // Within the block, as the end of a block is synced.
    std::int64_t room = 511 - synced % 512;
    if (rng.one_in(2)) {
      save(path, before);
      KvStore store = KvStore::append_to(path, Durability::kProcess);
      for (int i = 0; i < 5 && room > 0; ++i) {
        const std::int64_t count = rng.between(1, room);
        append_numbered(store, count);
        room -= count;
      }
      save(crashed, mixed(before, load(path), rng));
    } else {  // while it is closed: the mark is written when all else is on the disk
      std::string closed = load(path);
      const std::size_t mark = mark_of(closed);
      closed.replace(mark, 4096, before, mark, 4096);
      save(crashed, mixed(before, closed, rng));
    }
    for (const bool by_writer : {false, true, true}) {
      KvStore store = by_writer ? KvStore::append_to(crashed) : KvStore::open(crashed);
      EXPECT_GE(store.size(), synced);
      expect_numbered(store, 0, store.size());
      EXPECT_EQ(store.verify().keys, store.size());
      if (!by_writer) continue;
      append_numbered(store, 600);  // over what was dropped
      expect_numbered(store, 0, store.size());
    }
  }
}

}  // namespace
}  // namespace keyfold::test

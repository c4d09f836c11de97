// KvStore: what is appended comes back, to this process and to others, today and tomorrow.
#include "keyfold/kv_store.hpp"

#include <thread>

#include "io/mapped_file.hpp"
#include "io/safetensors.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

using io::test::throws_invalid;

constexpr KeyValueShape kShape{2, 3, 8, 5, DType::kFloat16};

TEST(Store, AppendsComeBackAcrossOpenings) {
  Rng rng("appends");
  const TemporaryFolder folder;
  const std::string path = folder / "chat.kv";
  std::int64_t size = 0;
  {
    KvStore store = KvStore::create(path, kShape, {.block_len = 512}, Durability::kProcess);
    EXPECT_EQ(store.size(), 0);
    EXPECT_TRUE(store.recovery().closed);
  }
  for (int n = 0; n < by_scale(3, 8, 20) && !testing::Test::HasFailure(); ++n) {
    KvStore store =
        KvStore::append_to(path, rng.one_in(2) ? Durability::kMachine : Durability::kProcess);
    EXPECT_EQ(store.size(), size);
    EXPECT_TRUE(store.recovery().closed);
    for (int i = 0; i < 5; ++i) {
      const std::int64_t count = rng.pick<std::int64_t>({0, 1, 1, 2, 511, 512, 513, 1700});
      append_numbered(store, count);
      size += count;
      EXPECT_EQ(store.size(), size);
    }
    expect_numbered(store, 0, size);
    if (rng.one_in(2)) store.close();
  }
  const KvStore store = KvStore::open(path);
  EXPECT_EQ(store.shape(), kShape);
  EXPECT_EQ(store.block_len(), 512);
  expect_numbered(store, 0, size);
  expect_numbered(store, size / 3, size / 2);
  const VerifyReport report = store.verify();
  EXPECT_EQ(report.keys, size);
  EXPECT_EQ(report.bytes, size * 2 * 3 * 13 * 2);
}

TEST(Store, GivesTheBitsOfArrays) {
  Rng rng("store bits");
  const TemporaryFolder folder;
  for (int n = 0; n < by_scale(6, 20, 80) && !testing::Test::HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = 2,
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 40),
           .kv_len = rng.between(0, 3000),
           .head_dim = 32};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(3)) c.window.left = rng.between(0, c.kv_len);
    c.layout = rng.pick<Layout>({Layout::kDense, Layout::kTransposed, Layout::kStridedDim});
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    const std::string path = folder / (std::to_string(n) + ".kv");
    KvStore store = KvStore::create(
        path, {c.batch, c.num_kv_heads, c.head_dim, call.v.sizes[3], c.dtype},
        {.block_len = rng.pick<std::int64_t>({512, 1024, 1536})}, Durability::kProcess);
    for (std::int64_t at = 0; at < c.kv_len;) {
      const std::int64_t end = std::min(c.kv_len, at + rng.between(1, 900));
      store.append(slice(call.k, 2, at, end), slice(call.v, 2, at, end));
      at = end;
    }
    SourceOptions how;
    how.ahead_bytes = rng.pick<std::int64_t>({1 << 18, 128 << 20});
    EXPECT_TRUE(run_source(call, *store.source(how)) == run_arrays(call));
  }
}

TEST(Store, IsASafetensorsFileWhenClosed) {
  const TemporaryFolder folder;
  const std::string path = folder / "chat.safetensors";
  KvStore store = KvStore::create(path, kShape, {.block_len = 512}, Durability::kProcess);
  append_numbered(store, 700);
  const auto index = [&] {
    const io::MappedFile file(path);
    return io::SafetensorsIndex(path, file.bytes());
  };
  EXPECT_THAT(index, throws_invalid("expected")) << "open: refused rather than read in part";
  store.close();
  const io::MappedFile file(path);
  const io::SafetensorsIndex closed(path, file.bytes());
  EXPECT_EQ(closed.entries().size(), 7U);  // two blocks of k, v and log, and what they are
  for (const std::int64_t block : {0, 1}) {
    const auto [k, v] = numbered(kShape, block * 512, 512);
    const io::TensorLayout keys = closed.find("k." + std::to_string(block));
    const io::TensorLayout values = closed.find("v." + std::to_string(block));
    EXPECT_EQ(keys.shape, (std::vector<std::int64_t>{2, 3, 512, 8}));
    EXPECT_EQ(values.shape, (std::vector<std::int64_t>{2, 3, 512, 5}));
    if (block == 0) {
      EXPECT_TRUE(std::string(reinterpret_cast<const char*>(values.data.data()),
                              values.data.size()) == bytes_of(v.view()));
    }
  }
  EXPECT_THAT([&] { append_numbered(store, 1); }, throws_invalid("expected a store that is open"));
}

TEST(Store, OneWriterAndReadersBesideIt) {
  const TemporaryFolder folder;
  const std::string path = folder / "chat.kv";
  KvStore writer = KvStore::create(path, kShape, {.block_len = 512}, Durability::kProcess);
  EXPECT_THAT([&] { KvStore::append_to(path); },
              ThrowsMessage<IoError>(HasSubstr("expected no other writer")));
  const KvStore reader = KvStore::open(path);
  EXPECT_EQ(reader.size(), 0);
  append_numbered(writer, 600);
  EXPECT_EQ(reader.size(), 600);
  const auto before = reader.source();
  append_numbered(writer, 600);
  EXPECT_EQ(before->size(), 600);
  EXPECT_EQ(reader.size(), 1200);
  expect_numbered(reader, 0, 1200);
  EXPECT_TRUE(KvStore::open(path).recovery().closed) << "its writer is at work";
  const auto kept = writer.source();
  writer.close();
  KvStore next = KvStore::append_to(path);
  append_numbered(next, 1);
  expect_numbered(*kept, 0, 1200);
}

TEST(Store, FollowersWaitForTheWriter) {
  Rng rng("follow");
  const TemporaryFolder folder;
  const std::string path = folder / "chat.kv";
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16, .causal = true}, rng);
  const Call call = inputs.call();
  const std::string expected = run_arrays(call);
  KvStore store = KvStore::create(path, {1, 1, 16, 16, DType::kFloat32}, {.block_len = 512},
                                  Durability::kProcess);
  const KvStore reader = KvStore::open(path);  // before there is anything to read
  const auto known = reader.follow({.until = 3000});
  EXPECT_EQ(known->size(), 3000);
  const auto open_end = reader.follow();
  EXPECT_TRUE(open_end->grows());
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    Rng pieces("follow pieces");
    for (std::int64_t at = 0; at < 3000;) {
      const std::int64_t end = std::min<std::int64_t>(3000, at + pieces.between(1, 200));
      store.append(slice(call.k, 2, at, end), slice(call.v, 2, at, end));
      at = end;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    store.close();
  });
  std::thread other([&] {
    Call all = call;  // with nothing that ends the keys before the store is closed
    all.options.causal = false;
    EXPECT_TRUE(run_source(all, *open_end) == run_arrays(all));
  });
  EXPECT_TRUE(run_source(call, *known) == expected);
  writer.join();
  other.join();

  EXPECT_EQ(read_all(*reader.follow({.until = 100}), 0, 3000).size(), 100U * 32 * 4);
  FollowOptions late{.until = 3001, .timeout_s = 0.05};
  EXPECT_THAT([&] { run_source(call, *reader.follow(late)); },
              ThrowsMessage<IoError>(HasSubstr("expected key 3000 within 0.05 s")));
  std::stop_source stop;
  stop.request_stop();
  FollowOptions stopped{.until = 3001, .stop_token = stop.get_token()};
  EXPECT_THROW(run_source(call, *reader.follow(stopped)), Cancelled);
}

TEST(Store, AFollowerReadsAgainWhatHasGrownMeanwhile) {
  const TemporaryFolder folder;
  KvStore store = KvStore::create(folder / "chat.kv", kShape, {.block_len = 512});
  const auto follower = store.follow();
  for (const std::int64_t count : {600, 300, 700}) {
    append_numbered(store, count);
    expect_numbered(*follower, 0, store.size());
  }
}

TEST(Store, WrongArgumentsAreNamed) {
  const TemporaryFolder folder;
  const std::string path = folder / "chat.kv";
  const auto create = [&](const KeyValueShape& shape, const KvStoreOptions& options) {
    return [=] { KvStore::create(path, shape, options); };
  };
  EXPECT_THAT(create({0, 1, 8, 8, DType::kFloat32}, {}), throws_invalid("batch: expected 1"));
  EXPECT_THAT(create({1, 1, 8, 8, DType::kBool}, {}), throws_invalid("dtype: expected float32"));
  EXPECT_THAT(create({1, 1, 8, 577, DType::kFloat32}, {}), throws_invalid("value_dim"));
  EXPECT_THAT(create(kShape, {.block_len = 700}), throws_invalid("expected a multiple of 512"));
  EXPECT_THAT(create(kShape, {.max_keys = 0}), throws_invalid("max_keys: expected 1"));
  EXPECT_THAT(create(kShape, {.block_len = 512, .max_keys = std::int64_t{1} << 40}),
              throws_invalid("make block_len larger"));
  EXPECT_TRUE(folder.names().empty());

  KvStore store = KvStore::create(path, kShape, {.block_len = 512, .max_keys = 1000});
  EXPECT_EQ(store.max_keys(), 1024);
  EXPECT_THAT(create(kShape, {}), ThrowsMessage<IoError>(HasSubstr("File exists")));
  const Tensor k(DType::kFloat16, {2, 3, 10, 8}), wide(DType::kFloat32, {2, 3, 10, 8});
  EXPECT_THAT([&] { store.append(k.view(), k.view()); }, throws_invalid("v: expected sizes"));
  EXPECT_THAT([&] { store.append(wide.view(), wide.view()); },
              throws_invalid("k: expected dtype float16"));
  append_numbered(store, 1000);
  EXPECT_THAT([&] { append_numbered(store, 25); }, throws_invalid("expected at most 24 keys more"));
  append_numbered(store, 24);
  EXPECT_EQ(store.size(), 1024);
  EXPECT_THAT([&] { KvStore::open(folder / "absent"); }, testing::Throws<IoError>());
  save(folder / "other", std::string(10000, 'x'));
  EXPECT_THAT([&] { KvStore::open(folder / "other"); }, throws_invalid("expected a store"));
}

}  // namespace
}  // namespace keyfold::test

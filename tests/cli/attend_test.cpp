// keyfold attend: the library's bits from files to files, and nothing left behind on failure.
#include <sys/mount.h>
#include <sys/resource.h>
#include <keyfold/attention.hpp>

#include <filesystem>

#include "io/npy.hpp"
#include "io/tensor_file.hpp"
#include "io/tensor_writer.hpp"
#include "process.hpp"
#include "random_tensor.hpp"

namespace keyfold::cli::test {
namespace {

using ::testing::ElementsAre;
using ::testing::UnorderedElementsAre;

std::string bytes(const TensorView& dense) {
  const auto size =
      static_cast<std::size_t>(dense.sizes[0] * dense.strides[0] * size_of(dense.dtype));
  return {static_cast<const char*>(dense.data), size};
}

void save_npy(const std::string& path, const TensorView& dense, std::size_t skip = 0) {
  save(path, io::npy_header(dense.dtype, std::span(dense.sizes).subspan(skip)) + bytes(dense));
}

std::string tensor_bytes(const std::string& spec) {
  const io::LoadedTensor tensor = io::open_tensor(spec);
  return {reinterpret_cast<const char*>(tensor.layout.data.data()), tensor.layout.data.size()};
}

// A call's tensors, random, and the library's own answer.
struct Call {
  explicit Call(DType dtype, const AttentionOptions& given = {}) : options(given) {
    const auto tensor = [&](const Dims& sizes, std::uint64_t seed) {
      return RandomTensor(dtype, sizes, seed, 1, {});
    };
    q.emplace(tensor({2, 4, 5, 16}, 1));
    k.emplace(tensor({2, 2, 700, 16}, 2));
    v.emplace(tensor({2, 2, 700, 24}, 3));
    out.emplace(tensor({2, 4, 5, 24}, 4));
    lse.emplace(RandomTensor(DType::kFloat32, {2, 4, 5, 1}, 5, 1, {}));
    options.lse = lse->view();
    scaled_dot_product_attention(q->view(), k->view(), v->view(), out->view(), options);
  }
  AttentionOptions options;
  std::optional<RandomTensor> q, k, v, out, lse;
};

// The arguments for these files in a folder.
std::vector<std::string> attend(const TemporaryFolder& folder,
                                const std::vector<std::string>& more = {}) {
  std::vector<std::string> args = {"attend",          "--q", folder / "q.npy", "--k",
                                   folder / "k.npy",  "--v", folder / "v.npy", "--out",
                                   folder / "out.npy"};
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

class Attend : public ::testing::Test {
 protected:
  void save_inputs(const Call& call) {
    save_npy(folder / "q.npy", call.q->view());
    save_npy(folder / "k.npy", call.k->view());
    save_npy(folder / "v.npy", call.v->view());
  }
  // The run fails with this code and text and leaves the inputs alone.
  void expect_failure(const std::vector<std::string>& args, int code, const std::string& text) {
    const std::vector<std::string> before = folder.names();
    const Outcome outcome = run(args);
    EXPECT_EQ(outcome.code, code) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(text));
    EXPECT_THAT(outcome.out, IsEmpty());
    EXPECT_EQ(folder.names(), before);
  }
  TemporaryFolder folder;
};

TEST_F(Attend, WritesTheLibrarysBits) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    AttentionOptions options;
    options.causal = true;
    options.window.left = 300;
    options.softcap = 20;
    options.scale = 0.5F;
    const Call call(dtype, options);
    save_inputs(call);
    const Outcome outcome =
        run(attend(folder, {"--lse", folder / "lse.npy", "--causal", "--window", "300,",
                            "--softcap", "20", "--scale", "0.5", "--json"}));
    ASSERT_EQ(outcome.code, kOk) << outcome.err;
    EXPECT_THAT(outcome.err, IsEmpty());
    EXPECT_EQ(tensor_bytes(folder / "out.npy"), bytes(call.out->view()));
    EXPECT_EQ(tensor_bytes(folder / "lse.npy"), bytes(call.lse->view()));
    EXPECT_EQ(io::open_tensor(folder / "out.npy").layout.dtype, dtype);
    EXPECT_THAT(io::open_tensor(folder / "lse.npy").layout.shape, ElementsAre(2, 4, 5));
    const nlohmann::json json = outcome.json();
    EXPECT_EQ(json["shape"]["kv_len"], 700);
    EXPECT_EQ(json["formula"]["window"], nlohmann::json::parse("[300,null]"));
    EXPECT_EQ(json["backend"], "cpu");
    EXPECT_GE(json["dispatches"], 1);
    EXPECT_EQ(json["recoveries"], 0);
  }
}

TEST_F(Attend, ReadsAndWritesSafetensors) {
  const Call call(DType::kBFloat16);
  std::vector<io::OutputTensor> tensors;
  std::vector<const void*> data;
  for (const auto& [name, tensor] : {std::pair("q", &call.q), {"k", &call.k}, {"v", &call.v}}) {
    const Dims& sizes = (*tensor)->view().sizes;
    tensors.push_back(
        {folder / "in.safetensors:" + name, "", DType::kBFloat16, {sizes.begin(), sizes.end()}});
    data.push_back((*tensor)->view().data);
  }
  io::TensorWriter(tensors).commit(data);
  const std::string in = folder / "in.safetensors:", out = folder / "out.safetensors:";
  const Outcome outcome = run({"attend", "--q", in + "q", "--k", in + "k", "--v", in + "v", "--out",
                               out + "o", "--lse", out + "l"});
  ASSERT_EQ(outcome.code, kOk) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("q [2, 4, 5, 16]"), HasSubstr("out.safetensors:l")));
  EXPECT_EQ(tensor_bytes(out + "o"), bytes(call.out->view()));
  EXPECT_EQ(tensor_bytes(out + "l"), bytes(call.lse->view()));
  EXPECT_THAT(folder.names(), UnorderedElementsAre("in.safetensors", "out.safetensors"));
}

// Swaps heads and rows of a dense tensor.
std::string transposed(const TensorView& dense) {
  const Dims& n = dense.sizes;
  const auto row = static_cast<std::size_t>(n[3] * size_of(dense.dtype));
  const std::string from = bytes(dense);
  std::string to;
  for (std::int64_t b = 0; b < n[0]; ++b)
    for (std::int64_t i = 0; i < n[2]; ++i)
      for (std::int64_t h = 0; h < n[1]; ++h)
        to += from.substr(static_cast<std::size_t>((b * n[1] + h) * n[2] + i) * row, row);
  return to;
}

TEST_F(Attend, LayoutSwapsHeadsAndRows) {
  const Call call(DType::kFloat32);
  for (const auto& [name, tensor] : {std::pair("q", &call.q), {"k", &call.k}, {"v", &call.v}}) {
    const Dims& n = (*tensor)->view().sizes;
    save(folder / (std::string(name) + ".npy"),
         io::npy_header(DType::kFloat32, Dims{n[0], n[2], n[1], n[3]}) +
             transposed((*tensor)->view()));
  }
  const Outcome outcome = run(attend(folder, {"--layout", "blhd", "--lse", folder / "lse.npy"}));
  ASSERT_EQ(outcome.code, kOk) << outcome.err;
  EXPECT_EQ(tensor_bytes(folder / "out.npy"), transposed(call.out->view()));
  EXPECT_EQ(tensor_bytes(folder / "lse.npy"), bytes(call.lse->view()));
  EXPECT_THAT(io::open_tensor(folder / "out.npy").layout.shape, ElementsAre(2, 5, 4, 24));
}

TEST_F(Attend, MissingAxesCountAsOne) {
  const RandomTensor q(DType::kFloat32, {1, 1, 3, 8}, 1, 1, {}),
      k(DType::kFloat32, {1, 1, 40, 8}, 2, 1, {});
  save_npy(folder / "q.npy", q.view(), 2);
  save_npy(folder / "k.npy", k.view(), 2);
  save_npy(folder / "v.npy", k.view(), 2);
  for (const char* layout : {"bhld", "blhd"}) {
    const Outcome outcome = run(attend(folder, {"--layout", layout, "--lse", folder / "lse.npy"}));
    ASSERT_EQ(outcome.code, kOk) << outcome.err;
    EXPECT_THAT(io::open_tensor(folder / "out.npy").layout.shape, ElementsAre(3, 8));
    EXPECT_THAT(io::open_tensor(folder / "lse.npy").layout.shape, ElementsAre(3));
  }
}

TEST_F(Attend, TakesMasksSinksAndLengths) {
  std::vector<std::uint8_t> visible(std::size_t{5} * 700);
  for (std::size_t i = 0; i < visible.size(); ++i) visible[i] = i % 3 != 0;
  const RandomTensor sinks(DType::kFloat32, {1, 4, 1, 1}, 9, 1, {});
  const std::int64_t lens[] = {600, 1};
  AttentionOptions options;
  options.mask = TensorView(visible.data(), DType::kBool, {1, 1, 5, 700});
  options.sinks = sinks.view();
  options.kv_lens = lens;
  const Call call(DType::kFloat32, options);
  save_inputs(call);
  save_npy(folder / "mask.npy", *options.mask, 2);
  for (const auto& shape : {io::test::Shape{4}, {1, 4, 1, 1}}) {
    save(folder / "sinks.npy", io::npy_header(DType::kFloat32, shape) + bytes(sinks.view()));
    const Outcome outcome = run(attend(folder, {"--mask", folder / "mask.npy", "--sinks",
                                                folder / "sinks.npy", "--kv-lens", "600,1"}));
    ASSERT_EQ(outcome.code, kOk) << outcome.err;
    EXPECT_EQ(tensor_bytes(folder / "out.npy"), bytes(call.out->view()));
  }
}

TEST_F(Attend, BadInputsAreNamed) {
  const Call call(DType::kFloat32);
  save_inputs(call);
  const std::string good = load(folder / "k.npy");
  const auto with_k = [&](const std::string& contents, int code, const std::string& text) {
    save(folder / "k.npy", contents);
    expect_failure(attend(folder), code, text);
  };
  with_k(good.substr(0, good.size() - 1), kUsage, "k.npy");
  with_k(good.substr(0, 20), kUsage, "k.npy");
  with_k("", kUsage, "k.npy");
  with_k(io::npy_header(DType::kFloat32, io::test::Shape{1, 1, 1, 1, 2}) + "12345678", kUsage,
         "k.npy");
  with_k(io::npy_header(DType::kFloat32, Dims{2, 2, 1, 16}) + std::string(256, 1), kUsage,
         "v.npy: expected values [2, 2, 1, value_dim]");
  with_k(io::npy_header(DType::kFloat16, Dims{2, 2, 1, 16}) + std::string(128, 1), kUsage,
         "v.npy: expected float16, as the keys are, got float32");
  const std::string good_v = load(folder / "v.npy");
  save(folder / "v.npy", io::npy_header(DType::kFloat32, Dims{2, 3, 1, 16}) + std::string(384, 1));
  with_k(load(folder / "v.npy"), kUsage, "num_heads: expected a multiple");
  save(folder / "v.npy", io::npy_header(DType::kFloat32, Dims{2, 2, 1, 8}) + std::string(128, 1));
  with_k(load(folder / "v.npy"), kUsage, "expected head_dim 16, as q has it, got 8");
  save(folder / "v.npy", io::npy_header(DType::kFloat16, Dims{2, 2, 1, 16}) + std::string(128, 1));
  with_k(load(folder / "v.npy"), kUsage, "expected dtype float32, as q has it, got float16");
  save(folder / "v.npy", good_v);
  std::filesystem::remove(folder / "k.npy");
  expect_failure(attend(folder), kFailure, "k.npy");
}

TEST_F(Attend, BadOutputsAreNamed) {
  save_inputs(Call(DType::kFloat32));
  const auto with_out = [&](const std::string& out, int code, const std::string& text) {
    std::vector<std::string> args = attend(folder);
    args.back() = out;
    expect_failure(args, code, text);
  };
  with_out(folder / "absent/out.npy", kFailure, "absent/out.npy");
  with_out(folder / "q.npy/out.npy", kFailure, "q.npy/out.npy");
  with_out("/dev/full", kUsage, "/dev/full");
  with_out(folder / "out.txt", kUsage, "out.txt: expected a name that ends in .npy");
  expect_failure(attend(folder, {"--lse", folder / "out.npy"}), kUsage, "out.npy");
}

TEST_F(Attend, FullDiskLeavesNothing) {
  save_inputs(Call(DType::kFloat32));
  const std::string disk = folder / "disk";
  std::filesystem::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=4k") != 0)
    GTEST_SKIP() << "no right to mount a small disk";
  save(disk + "/filler", "a page");
  std::vector<std::string> args = attend(folder);
  args.back() = disk + "/out.npy";
  const Outcome outcome = run(args);
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("out.npy"), HasSubstr("No space left on device")));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(disk), {}), 1);
  ::umount(disk.c_str());
}

TEST_F(Attend, FileSizeLimitIsAnErrorToo) {
  save_inputs(Call(DType::kFloat32));
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit limit{2048, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const Outcome outcome = run(attend(folder));
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, HasSubstr("File too large"));
  EXPECT_THAT(folder.names(), UnorderedElementsAre("q.npy", "k.npy", "v.npy"));
}

TEST_F(Attend, AFailureKeepsTheOldOutput) {
  save_inputs(Call(DType::kFloat32));
  save(folder / "out.npy", "precious");
  const Outcome outcome = run(attend(folder, {"--kv-lens", "701,1"}));
  EXPECT_EQ(outcome.code, kUsage);
  EXPECT_EQ(load(folder / "out.npy"), "precious");
}

TEST_F(Attend, TruncatedKeysAreAnErrorWhileItRuns) {
  // A hole of 8 GiB takes longer to read than to cut off.
  save_inputs(Call(DType::kFloat32));
  const std::string header = io::npy_header(DType::kFloat32, Dims{2, 2, 1 << 25, 16});
  for (const char* name : {"k.npy", "v.npy"}) {
    save(folder / name, header);
    std::filesystem::resize_file(folder / name, header.size() + (std::uintmax_t{1} << 33));
  }
  Process process(attend(folder));
  for (int i = 0; i < 3000 && folder.names().size() == 3; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  std::filesystem::resize_file(folder / "v.npy", header.size());
  const Outcome outcome = process.wait();
  EXPECT_EQ(outcome.code, kFailure);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("v.npy"), HasSubstr("it was truncated")));
  EXPECT_THAT(folder.names(), UnorderedElementsAre("q.npy", "k.npy", "v.npy"));
}

TEST_F(Attend, TakesKeysAndValuesFromAStore) {
  AttentionOptions options;
  options.causal = true;
  const Call call(DType::kBFloat16, options);
  save_inputs(call);
  const std::string store = folder / "chat.kv";
  const Outcome appended =
      run({"store", "append", store, "--k", folder / "k.npy", "--v", folder / "v.npy", "--json"});
  ASSERT_EQ(appended.code, kOk) << appended.err;
  EXPECT_EQ(appended.json()["keys"], 700);
  EXPECT_EQ(appended.json()["closed"], true);
  const Outcome outcome = run(
      {"attend", "--q", folder / "q.npy", "--kv", store, "--out", folder / "out.npy", "--causal"});
  ASSERT_EQ(outcome.code, kOk) << outcome.err;
  EXPECT_EQ(tensor_bytes(folder / "out.npy"), bytes(call.out->view()));

  EXPECT_EQ(run({"store", "append", store, "--k", folder / "k.npy", "--v", folder / "v.npy"}).code,
            kOk);
  const Outcome verified = run({"store", "verify", store});
  EXPECT_EQ(verified.code, kOk) << verified.err;
  EXPECT_THAT(verified.out, AllOf(HasSubstr("k [2, 2, 1400, 16], v [2, 2, 1400, 24], bfloat16"),
                                  HasSubstr("verified   1400 keys")));
  std::string damaged = load(store);
  damaged[damaged.find("KEYFLDKV") + 8192] ^= 1;  // in the first key
  save(store, damaged);
  EXPECT_EQ(run({"store", "info", store}).code, kOk);
  const Outcome failed = run({"store", "verify", store});
  EXPECT_EQ(failed.code, kUsage);
  EXPECT_THAT(failed.err, AllOf(HasSubstr("chat.kv"), HasSubstr("of keys 0 to 699")));
}

// Long enough for any machine: tens of seconds on one thread. The keys are a hole in a file.
class LongAttend : public Attend {
 protected:
  void SetUp() override {
    for (const auto& [name, sizes] :
         {std::pair("q.npy", Dims{1, 64, 2048, 64}), {"k.npy", Dims{1, 1, 1 << 18, 64}}}) {
      const std::string header = io::npy_header(DType::kFloat32, sizes);
      save(folder / name, header);
      std::filesystem::resize_file(
          folder / name,
          header.size() + static_cast<std::size_t>(sizes[1] * sizes[2] * sizes[3] * 4));
    }
    std::filesystem::copy_file(folder / "k.npy", folder / "v.npy");
  }
  // Waits until the output's temporary file is there: the work is about to begin.
  void wait_for_start() {
    for (int i = 0; i < 3000 && folder.names().size() == 3; ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
  }
};

TEST_F(LongAttend, SignalsStopItAtOnceAndLeaveNothing) {
  for (const int number : {SIGINT, SIGTERM}) {
    Process process(attend(folder, {"--threads", "1"}));
    wait_for_start();
    ASSERT_EQ(folder.names().size(), 4U);
    const auto start = std::chrono::steady_clock::now();
    process.signal(number);
    const Outcome outcome = process.wait();
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
    EXPECT_EQ(outcome.code, kFailure);
    EXPECT_THAT(outcome.err, HasSubstr("cancelled after"));
    EXPECT_THAT(folder.names(), UnorderedElementsAre("q.npy", "k.npy", "v.npy"));
  }
}

}  // namespace
}  // namespace keyfold::cli::test

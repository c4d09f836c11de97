// Output files: round trips, and what is left behind when writing fails.
#include "io/tensor_writer.hpp"

#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>

#include "files.hpp"
#include "io/safetensors.hpp"
#include "io/tensor_file.hpp"
#include "keyfold/io_error.hpp"

namespace keyfold::io::test {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;
using ::testing::UnorderedElementsAre;

// Files may not grow beyond this many bytes while it lives: to a writer, a disk that fills up.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : signal_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, signal_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
  void (*signal_)(int);
};

void write_one(const OutputTensor& tensor, const void* data) {
  TensorWriter writer({tensor});
  writer.commit(std::vector<const void*>{data});
}

TEST(TensorWriter, RoundTripsEveryTypeAndRank) {
  const TemporaryFolder folder;
  for (const std::string suffix : {".npy", ".safetensors"}) {
    const std::string path = folder / ("t" + suffix);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kBool}) {
      for (const Shape& shape : {Shape{}, {3}, {0, 4}, {2, 3}, {1, 2, 3}, {2, 1, 3, 4}}) {
        std::string data;
        for (std::int64_t i = 0; i < byte_size("", dtype, shape); ++i) data += static_cast<char>(i);
        write_one({path, "t", dtype, shape}, data.data());
        const LoadedTensor tensor = open_tensor(path);
        EXPECT_EQ(tensor.layout.dtype, dtype);
        EXPECT_EQ(tensor.layout.shape, shape);
        EXPECT_EQ(std::string(reinterpret_cast<const char*>(tensor.layout.data.data()),
                              tensor.layout.data.size()),
                  data);
      }
    }
  }
  EXPECT_THAT(folder.names(), UnorderedElementsAre("t.npy", "t.safetensors"));
}

TEST(TensorWriter, SeveralTensorsInOneFileAreAligned) {
  const TemporaryFolder folder;
  const std::string path = folder / "r.safetensors";
  const std::string again = folder.path() / "." / "r.safetensors:log\"sum";
  TensorWriter writer(
      {{path, "out", DType::kFloat16, {1, 3}}, {again, "", DType::kFloat32, {1, 2}}});
  const std::vector<std::uint16_t> out = {1, 2, 3};
  const std::vector<float> lse = {4.0F, 5.0F};
  writer.commit(std::vector<const void*>{out.data(), lse.data()});
  EXPECT_THAT(folder.names(), ElementsAre("r.safetensors"));
  EXPECT_EQ(static_cast<const std::uint16_t*>(open_tensor(path + ":out").view().data)[2], 3);
  EXPECT_EQ(static_cast<const float*>(open_tensor(path + ":log\"sum").view().data)[1], 5.0F);
}

TEST(TensorWriter, NothingAppearsBeforeCommit) {
  const TemporaryFolder folder;
  save(folder / "old.npy", "old");
  {
    TensorWriter writer({{folder / "old.npy", "", DType::kFloat32, {1}},
                         {folder / "new.npy", "", DType::kFloat32, {1}}});
    EXPECT_EQ(folder.names().size(), 3u);
    EXPECT_EQ(load(folder / "old.npy"), "old");
  }
  EXPECT_THAT(folder.names(), ElementsAre("old.npy"));
}

TEST(TensorWriter, KeepsModeAndFollowsLinks) {
  const TemporaryFolder folder;
  const std::string target = folder / "target.npy";
  save(target, "old");
  ::chmod(target.c_str(), 0640);
  std::filesystem::create_symlink("target.npy", folder / "link.npy");
  const float value = 1;
  write_one({folder / "link.npy", "", DType::kFloat32, {1}}, &value);
  EXPECT_TRUE(std::filesystem::is_symlink(folder / "link.npy"));
  EXPECT_EQ(open_tensor(target).layout.data.size(), 4u);
  struct stat status {};
  ::stat(target.c_str(), &status);
  EXPECT_EQ(status.st_mode & 07777, 0640u);
}

TEST(TensorWriter, RefusesBadNames) {
  const TemporaryFolder folder;
  const auto with = [&](const std::string& spec, const std::string& name = "t") {
    return [spec, name] { TensorWriter writer({{spec, name, DType::kFloat32, {1}}}); };
  };
  EXPECT_THAT(with(folder / "t.txt"), throws_invalid("ends in .npy or .safetensors"));
  EXPECT_THAT(with(""), throws_invalid("ends in .npy or .safetensors"));
  EXPECT_THAT(with(folder / "t.safetensors:__metadata__"), throws_invalid("__metadata__"));
  EXPECT_THAT(with(folder / "t.safetensors:\xff"), throws_invalid("UTF-8"));
  EXPECT_THAT(with(folder / "t.safetensors", ""), throws_invalid("tensor names"));
  const std::string same = folder / "t.npy";
  EXPECT_THAT(
      [&] {
        TensorWriter writer({{same, "", DType::kBool, {}}, {same, "", DType::kBool, {}}});
      },
      throws_invalid("one tensor for a .npy file"));
  const std::string twice = folder / "t.safetensors";
  EXPECT_THAT(
      [&] {
        TensorWriter writer({{twice, "a", DType::kBool, {}}, {twice, "a", DType::kBool, {}}});
      },
      throws_invalid("got 'a'"));
  EXPECT_THAT(folder.names(), IsEmpty());
}

TEST(TensorWriter, RefusesPlacesThatCannotBeWritten) {
  const TemporaryFolder folder;
  const auto with = [&](const std::string& spec) {
    return [spec] { TensorWriter writer({{spec, "t", DType::kFloat32, {1}}}); };
  };
  const std::string nowhere = folder / "none/t.npy";
  EXPECT_THAT(with(nowhere),
              ThrowsMessage<IoError>("cannot write " + nowhere + ": No such file or directory"));
  EXPECT_THAT(with("/proc/t.npy"), ThrowsMessage<IoError>(HasSubstr("cannot write /proc/t.npy: ")));
  std::filesystem::create_directory(folder / "d.npy");
  EXPECT_THAT(with(folder / "d.npy"), throws_invalid("regular file"));
  ::mkfifo((folder / "p.npy").c_str(), 0600);
  EXPECT_THAT(with(folder / "p.npy"), throws_invalid("regular file"));
  std::filesystem::create_symlink("/dev/null", folder / "null.npy");
  EXPECT_THAT(with(folder / "null.npy"), throws_invalid("regular file"));
  EXPECT_THAT(folder.names(), UnorderedElementsAre("d.npy", "p.npy", "null.npy"));
}

TEST(TensorWriter, RefusesProtectedFilesAndFolders) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write everywhere";
  const TemporaryFolder folder;
  save(folder / "t.npy", "old");
  ::chmod((folder / "t.npy").c_str(), 0400);
  const auto write = [&] { TensorWriter writer({{folder / "t.npy", "", DType::kBool, {1}}}); };
  EXPECT_THAT(write, ThrowsMessage<IoError>(HasSubstr("Permission denied")));
  ::chmod((folder / "t.npy").c_str(), 0600);
  ::chmod(folder.path().c_str(), 0500);
  EXPECT_THAT(write, ThrowsMessage<IoError>(HasSubstr("Permission denied")));
  ::chmod(folder.path().c_str(), 0700);
  EXPECT_EQ(load(folder / "t.npy"), "old");
}

TEST(TensorWriter, NoSpaceIsFoundBeforeTheWork) {
  const TemporaryFolder folder;
  save(folder / "t.npy", "old");
  {
    const FileSizeLimit limit(1 << 16);
    EXPECT_THAT(
        [&] {
          TensorWriter writer({{folder / "t.npy", "", DType::kFloat32, {1 << 20}}});
        },
        ThrowsMessage<IoError>(HasSubstr("File too large")));
  }
  EXPECT_THAT(
      [&] {
        TensorWriter writer({{folder / "t.npy", "", DType::kFloat32, {1LL << 60}}});
      },
      ::testing::Throws<IoError>());
  EXPECT_THAT(folder.names(), ElementsAre("t.npy"));
  EXPECT_EQ(load(folder / "t.npy"), "old");
}

TEST(TensorWriter, FailedWriteLeavesAllTargetsAsTheyWere) {
  const TemporaryFolder folder;
  save(folder / "out.npy", "old");
  const std::vector<float> data(1 << 20);
  {
    TensorWriter writer({{folder / "lse.npy", "", DType::kFloat32, {1}},
                         {folder / "out.npy", "", DType::kFloat32, {1 << 20}}});
    const FileSizeLimit limit(1 << 16);
    const std::vector<const void*> pointers = {data.data(), data.data()};
    EXPECT_THAT([&] { writer.commit(pointers); },
                ThrowsMessage<IoError>(HasSubstr("out.npy: File too large")));
  }
  EXPECT_THAT(folder.names(), ElementsAre("out.npy"));
  EXPECT_EQ(load(folder / "out.npy"), "old");
}

TEST(TensorWriter, FailedRenameRemovesTheTemporary) {
  const TemporaryFolder folder;
  {
    TensorWriter writer({{folder / "t.npy", "", DType::kFloat32, {1}}});
    std::filesystem::create_directory(folder / "t.npy");
    const float value = 1;
    EXPECT_THAT([&] { writer.commit(std::vector<const void*>{&value}); },
                ThrowsMessage<IoError>(HasSubstr("Is a directory")));
  }
  EXPECT_THAT(folder.names(), ElementsAre("t.npy"));
}

TEST(TensorWriter, FullDiskLeavesNothing) {
  const TemporaryFolder folder;
  const std::string disk = folder / "disk";
  std::filesystem::create_directory(disk);
  if (::mount("none", disk.c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "no right to mount a small disk";
  }
  EXPECT_THAT(
      [&] {
        TensorWriter writer({{disk + "/t.npy", "", DType::kFloat32, {1 << 20}}});
      },
      ThrowsMessage<IoError>(HasSubstr("No space left on device")));
  EXPECT_TRUE(std::filesystem::is_empty(disk));
  ::umount(disk.c_str());
}

}  // namespace
}  // namespace keyfold::io::test

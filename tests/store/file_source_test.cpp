// open_source(): the bits of arrays from every file, shape, order of axes and size of piece.
#include "keyfold/file_source.hpp"

#include <csignal>
#include <filesystem>

#include "io/tensor_writer.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

/// Axes in another order, as a view.
TensorView swapped(TensorView t) {
  std::swap(t.sizes[1], t.sizes[2]);
  std::swap(t.strides[1], t.strides[2]);
  return t;
}

/// As NumPy saves an array in Fortran order: the first axis is the innermost.
void save_fortran(const std::string& path, const TensorView& t) {
  TensorView reversed = t;
  std::reverse(reversed.sizes.begin(), reversed.sizes.end());
  std::reverse(reversed.strides.begin(), reversed.strides.end());
  std::string shape;
  for (const std::int64_t size : t.sizes) shape += std::to_string(size) + ", ";
  const char* type = t.dtype == DType::kFloat32   ? "<f4"
                     : t.dtype == DType::kFloat16 ? "<f2"
                                                  : "<V2";
  save(path, io::test::npy_file("{'descr': '" + std::string(type) +
                                    "', 'fortran_order': True, 'shape': (" + shape + "), }",
                                bytes_of(reversed)));
}

TEST(FileSource, EveryFileGivesTheBitsOfArrays) {
  Rng rng("files");
  const TemporaryFolder folder;
  const std::string k = folder / "k.npy", v = folder / "v.npy", both = folder / "kv.safetensors";
  for (int n = 0; n < by_scale(8, 40, 100) && !testing::Test::HasFailure(); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = rng.pick<std::int64_t>({1, 2, 4}),
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 40),
           .kv_len = rng.one_in(4) ? rng.between(0, 99) : rng.between(100, 2500),
           .head_dim = rng.pick<std::int64_t>({5, 32, 64})};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(3)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(3)) c.mask = Mask::kAdditive;
    c.sinks = rng.one_in(3);
    if (rng.one_in(3))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    SourceOptions how;
    how.ahead_bytes = c.kv_len < 100 ? 1 : rng.pick<std::int64_t>({1 << 18, 1 << 20, 128 << 20});
    how.num_threads = static_cast<int>(rng.between(1, 4));

    std::unique_ptr<KeyValueSource> source;
    switch (rng.between(0, 3)) {
      case 0:
        save_npy(k, call.k), save_npy(v, call.v);
        source = open_source(k, v, Axes::kBHLD, how);
        break;
      case 1:
        save_npy(k, swapped(call.k)), save_npy(v, swapped(call.v));
        source = open_source(k, v, Axes::kBLHD, how);
        break;
      case 2:
        save_fortran(k, call.k), save_fortran(v, call.v);
        source = open_source(k, v, Axes::kBHLD, how);
        break;
      case 3: {
        const auto spec = [&](const char* name, const TensorView& t) {
          return io::OutputTensor{both + ":" + name, "", t.dtype, {t.sizes.begin(), t.sizes.end()}};
        };
        const std::string keys = bytes_of(call.k), values = bytes_of(call.v);
        const void* const data[] = {keys.data(), values.data()};
        io::TensorWriter({spec("k", call.k), spec("v", call.v)}).commit(data);
        source = open_source(both + ":k", both + ":v", Axes::kBHLD, how);
      }
    }
    EXPECT_EQ(source->size(), c.kv_len);
    EXPECT_FALSE(source->grows());
    const std::string expected = run_arrays(call);
    EXPECT_TRUE(run_source(call, *source) == expected);
    EXPECT_TRUE(run_source(call, *source) == expected) << "the second time";
  }
}

TEST(FileSource, LongAndInRowBlocks) {
  Rng rng("long files");
  const std::int64_t kv_len = by_scale<std::int64_t>(5000, 20000, 131072);
  const TemporaryFolder folder;
  for (const std::int64_t q_len : {1, 150}) {
    const Inputs inputs({.dtype = DType::kFloat16,
                         .num_heads = 4,
                         .num_kv_heads = 2,
                         .q_len = q_len,
                         .kv_len = kv_len,
                         .head_dim = 64,
                         .causal = true},
                        rng);
    const Call call = inputs.call();
    save_npy(folder / "k.npy", call.k);
    save_npy(folder / "v.npy", call.v);
    const std::string expected = run_arrays(call);
    SourceOptions how;
    how.ahead_bytes = 4 << 20;
    const auto source = open_source(folder / "k.npy", folder / "v.npy", Axes::kBHLD, how);
    EXPECT_TRUE(run_source(call, *source) == expected);
    const std::int64_t all = plan(call.shape(), call.options).scratch_bytes;
    EXPECT_TRUE(run_source(call, *source, all - 1) == expected) << "in row blocks";
  }
}

TEST(FileSource, AxesThatAreMissingCountAsOne) {
  Rng rng("axes");
  const Inputs inputs({.num_heads = 1, .kv_len = 700, .head_dim = 16}, rng);
  const TemporaryFolder folder;
  save_npy(folder / "k.npy", inputs.k.view(), 2);
  save_npy(folder / "v.npy", inputs.v.view(), 1);
  const auto source = open_source(folder / "k.npy", folder / "v.npy");
  EXPECT_TRUE(run_source(inputs.call(), *source) == run_arrays(inputs.call()));
  save_npy(folder / "v.npy", inputs.v.view(), 2);  // two axes have no order
  EXPECT_EQ(open_source(folder / "k.npy", folder / "v.npy", Axes::kBLHD)->size(), 700);
}

TEST(FileSource, WhatDoesNotFitIsNamed) {
  Rng rng("misfits");
  const TemporaryFolder folder;
  const Tensor k(DType::kFloat32, {1, 2, 10, 8}), half(DType::kFloat16, {1, 2, 10, 8}),
      longer(DType::kFloat32, {1, 2, 11, 8}), flags(DType::kBool, {1, 2, 10, 8});
  save_npy(folder / "k.npy", k.view());
  save_npy(folder / "half.npy", half.view());
  save_npy(folder / "longer.npy", longer.view());
  save_npy(folder / "flags.npy", flags.view());
  const std::string whole = load(folder / "k.npy");
  save(folder / "cut.npy", whole.substr(0, whole.size() - 1));
  save(folder / "other", "other contents");
  const auto open = [&](const char* keys, const char* values) {
    return [=, &folder] { open_source(folder / keys, folder / values); };
  };
  using io::test::throws_invalid;
  EXPECT_THAT(open("k.npy", "half.npy"), throws_invalid("half.npy: expected float32"));
  EXPECT_THAT(open("k.npy", "longer.npy"), throws_invalid("longer.npy: expected values [1, 2, 10"));
  EXPECT_THAT(open("flags.npy", "k.npy"), throws_invalid("flags.npy: expected float32, float16"));
  EXPECT_THAT(open("cut.npy", "k.npy"), throws_invalid("expected 640 bytes of data"));
  EXPECT_THAT(open("other", "k.npy"), throws_invalid("other: expected a file as numpy.save"));
  EXPECT_THAT(open("absent", "k.npy"), ThrowsMessage<IoError>(HasSubstr("cannot open")));
  EXPECT_THAT([&] { open_source(folder.path(), folder / "k.npy"); },
              throws_invalid("expected a regular file"));
  SourceOptions how;
  how.num_threads = 0;
  EXPECT_THAT([&] { open_source(folder / "k.npy", folder / "k.npy", Axes::kBHLD, how); },
              throws_invalid("num_threads: expected 1 to 64, got 0"));
}

/// Keys in files that are changed between two pieces.
class Changed : public testing::Test {
 protected:
  Changed() {
    Rng rng("changed");
    inputs.emplace(Case{.num_kv_heads = 2, .kv_len = 4000, .head_dim = 64}, rng);
    save_npy(folder / "k.npy", inputs->k.view());
    save_npy(folder / "v.npy", inputs->v.view());
    SourceOptions how;
    how.ahead_bytes = 1 << 20;
    source = open_source(folder / "k.npy", folder / "v.npy", Axes::kBHLD, how);
  }
  /// Attention whose progress callback does this once.
  void attend(const std::function<void()>& change, Result& result) {
    const Call call = inputs->call();
    AttentionOptions options = options_of(call, result);
    bool changed = false;
    options.run.progress = [&](const Progress&) {
      if (!changed) change();
      changed = true;
    };
    scaled_dot_product_attention(call.q, *source, result.out.mutable_view(), options);
  }

  TemporaryFolder folder;
  std::optional<Inputs> inputs;
  std::unique_ptr<KeyValueSource> source;
};

TEST_F(Changed, ATruncatedFileIsAnErrorAndTheProcessLives) {
  for (const std::uintmax_t left : {std::uintmax_t{100}, std::uintmax_t{500'000}}) {
    save_npy(folder / "k.npy", inputs->k.view());
    Result result(inputs->call());
    EXPECT_THAT(
        [&] { attend([&] { std::filesystem::resize_file(folder / "k.npy", left); }, result); },
        ThrowsMessage<IoError>(AllOf(HasSubstr("k.npy"), HasSubstr("it was truncated"))));
    EXPECT_TRUE(result.untouched());
  }
  save_npy(folder / "k.npy", inputs->k.view());
  EXPECT_TRUE(run_source(inputs->call(), *source) == run_arrays(inputs->call())) << "whole again";
}

TEST_F(Changed, MappedPagesThatAreLostReadAsZerosAndAreReported) {
  source->seek(0, 4000);
  const KeyValuePiece piece = source->next();
  std::filesystem::resize_file(folder / "v.npy", 0);
  EXPECT_EQ(bytes_of(piece.v).find_first_not_of('\0'), std::string::npos);
  EXPECT_THAT([&] { source->release(); },
              ThrowsMessage<IoError>(AllOf(HasSubstr("v.npy"), HasSubstr("got 0"))));
}

TEST_F(Changed, AFileReplacedByRenamingIsReadToItsEnd) {
  Result result(inputs->call());
  attend(
      [&] {
        save(folder / "new.npy", "other contents");
        std::filesystem::rename(folder / "new.npy", folder / "k.npy");
      },
      result);
  EXPECT_TRUE(result.bytes() == run_arrays(inputs->call()));
}

TEST_F(Changed, OtherBusErrorsGoWhereTheyWent) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  source->seek(0, 4000);
  source->next();                        // the guard is there
  EXPECT_DEATH(std::raise(SIGBUS), "");  // by the signal, or by a sanitizer's own handler
}

}  // namespace
}  // namespace keyfold::test

// Long keys and large indices: 128K and 256K keys, 128K x 128K, a needle among a million, offsets
// and positions past 2^31.
#include <sys/mman.h>

#include <cmath>

#include "core/half.hpp"
#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class Long : public BackendTest {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (scale() != Scale::kFull) GTEST_SKIP() << "only at KEYFOLD_TEST_SCALE=full";
  }

  /// Each row for itself, so that a short row does not lend its error to a long one.
  void expect_rows_right(const Call& call, const Outputs& got,
                         const std::vector<RowId>& rows) const {
    for (const RowId& row : rows) {
      SCOPED_TRACE(testing::Message() << "head " << row.head << " row " << row.row);
      expect_right(call, got, {row});
    }
  }
};
KEYFOLD_FOR_EACH_BACKEND(Long);

TEST_P(Long, PrefillStepsOver128KAnd256KKeys) {
  Rng rng("steps");
  for (const std::int64_t kv_len : {131072, 262144})
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const Inputs inputs({.dtype = dtype,
                           .num_heads = 4,
                           .num_kv_heads = 1,
                           .q_len = 256,
                           .kv_len = kv_len,
                           .head_dim = 64,
                           .causal = true},
                          rng);
      const Call call = inputs.call();
      const Outputs got = run(call);
      expect_rows_right(call, got, {{0, 0, 0}, {0, 1, 17}, {0, 2, 128}, {0, 3, 255}});
    }
}

TEST_P(Long, DecodeKeepsItsAccuracy) {
  Rng rng("decode");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    const Inputs inputs(
        {.dtype = dtype, .num_heads = 8, .num_kv_heads = 1, .kv_len = 262144, .head_dim = 64}, rng);
    const Call call = inputs.call().rows(3, 4);
    expect_rows_right(call, run(call), all_rows(call.q));
  }
}

TEST_P(Long, Square128K) {
  constexpr std::int64_t kLen = 131072;
  Rng rng("square");
  const Inputs inputs({.dtype = DType::kBFloat16,
                       .num_heads = 1,
                       .q_len = kLen,
                       .kv_len = kLen,
                       .head_dim = 16,
                       .causal = true},
                      rng);
  const Call call = inputs.call();
  RunOptions how;
  how.max_scratch_bytes = plan_of(call).scratch_bytes / 2;  // several blocks of rows
  const Outputs got = run(call, how);
  EXPECT_EQ(got.report.staging_bytes > 0, !on_device(GetParam(), call));
  EXPECT_LE(got.report.scratch_bytes, *how.max_scratch_bytes);
  std::vector<RowId> rows;
  for (const std::int64_t row : {0, 1, 511, 512, 513, 65535, 65536, 131070, 131071})
    rows.push_back({0, 0, row});
  for (int n = 0; n < 12; ++n) rows.push_back({0, 0, rng.between(0, kLen - 1)});
  expect_rows_right(call, got, rows);
}

TEST_P(Long, ANeedleAmongAMillionKeys) {
  constexpr std::int64_t kLen = 1 << 20;
  Rng rng("needle");
  Inputs inputs(
      {.dtype = DType::kFloat16, .num_heads = 1, .q_len = 2, .kv_len = kLen, .head_dim = 16}, rng);
  const std::int64_t split = split_len(inputs.call());
  for (const std::int64_t place : {std::int64_t{0}, split - 1, split, kLen / 2 + 3, kLen - 1}) {
    SCOPED_TRACE(place);
    std::vector<float> old;
    for (std::int64_t d = 0; d < 16; ++d) {
      old.push_back(inputs.k.at({0, 0, place, d}));
      inputs.k.set({0, 0, place, d}, 10 * inputs.q.at({0, 0, 1, d}));
    }
    const Call call = inputs.call();
    const Outputs got = run(call);
    expect_rows_right(call, got, all_rows(call.q));
    // The second query's score stands tens above a million others: what it finds is the needle.
    for (std::int64_t d = 0; d < 16; ++d) {
      EXPECT_NEAR(got.out.at({0, 0, 1, d}), inputs.v.at({0, 0, place, d}), 0.05);
      inputs.k.set({0, 0, place, d}, old[static_cast<std::size_t>(d)]);
    }
  }
}

/// Address space without memory behind it: pages are made when they are touched.
class Sparse {
 public:
  explicit Sparse(std::int64_t bytes)
      : bytes_(static_cast<std::size_t>(bytes)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  bool good() const { return data_ != MAP_FAILED; }
  void* data() const { return data_; }
  /// A copy of `dense` with these strides.
  MutableTensorView copy(const Tensor& dense, const Dims& strides) const {
    const MutableTensorView view(data_, dense.dtype(), dense.sizes(), strides);
    dense.each([&](const Dims& i) {
      core::store_float(core::element(view, i[0], i[1], i[2], i[3]), dense.dtype(), dense.at(i));
    });
    return view;
  }

 private:
  std::size_t bytes_;
  void* data_;
};

TEST_P(Long, OffsetsPast2To31Elements) {
  Rng rng("offsets");
  const Inputs inputs({.dtype = DType::kFloat16,
                       .batch = 2,
                       .num_heads = 4,
                       .num_kv_heads = 2,
                       .q_len = 5,
                       .kv_len = 1500,
                       .head_dim = 8},
                      rng);
  const std::vector<std::byte> expected = run(inputs.call()).bytes();
  // Each axis in its turn reaches past 2^32 elements.
  const Dims far[] = {{std::int64_t{1} << 32, 1 << 16, 8, 1},
                      {1 << 17, std::int64_t{1} << 32, 8, 1},
                      {1 << 6, 1 << 4, std::int64_t{3} << 20, 1},
                      {1 << 16, 1 << 13, 1, std::int64_t{1} << 30}};
  for (const Dims& strides : far) {
    const std::int64_t elements = strides[0] + 4 * strides[1] + 1500 * strides[2] + 8 * strides[3];
    const Sparse q(2 * elements), k(2 * elements), v(2 * elements), out(2 * elements);
    ASSERT_TRUE(q.good() && k.good() && v.good() && out.good()) << "no address space";
    Call call = inputs.call();
    call.q = q.copy(inputs.q, strides);
    call.k = k.copy(inputs.k, strides);
    call.v = v.copy(inputs.v, strides);
    EXPECT_TRUE(run(call).bytes() == expected);
    // And the outputs.
    Tensor poison(DType::kFloat16, call.out_sizes());
    poison.poison();
    const MutableTensorView far_out = out.copy(poison, strides);
    AttentionOptions options;
    options.run.backend = GetParam();
    scaled_dot_product_attention(call.q, call.k, call.v, far_out, options);
    Outputs got = run(call);
    got.out.each([&](const Dims& i) { ASSERT_EQ(load(far_out, i), got.out.at(i)); });
  }
}

TEST_P(Long, PositionsPast2To31) {
  // All keys but the last few hundred of more than 2^32 are outside of the window.
  constexpr std::int64_t kLen = (std::int64_t{1} << 32) + 12345;
  const Sparse k(2 * kLen), v(2 * kLen);
  ASSERT_TRUE(k.good() && v.good()) << "no address space";
  Rng rng("positions");
  Inputs inputs({.dtype = DType::kFloat16,
                 .num_heads = 1,
                 .q_len = 4,
                 .kv_len = 900,
                 .head_dim = 1,
                 .causal = true,
                 .window = {700, {}}},
                rng);
  const Call small = inputs.call();
  Call call = small;
  const Dims sizes{1, 1, kLen, 1};
  const MutableTensorView far_k(k.data(), DType::kFloat16, sizes);
  const MutableTensorView far_v(v.data(), DType::kFloat16, sizes);
  for (std::int64_t j = 0; j < 900; ++j) {
    core::store_float(core::element(far_k, 0, 0, kLen - 900 + j, 0), DType::kFloat16,
                      inputs.k.at({0, 0, j, 0}));
    core::store_float(core::element(far_v, 0, 0, kLen - 900 + j, 0), DType::kFloat16,
                      inputs.v.at({0, 0, j, 0}));
  }
  call.k = far_k;
  call.v = far_v;
  const Outputs got = run(call);
  EXPECT_LT(got.report.dispatches, 10);  // what nobody sees is not worth a dispatch
  expect_right(small, got, all_rows(small.q));
}

}  // namespace
}  // namespace keyfold::test

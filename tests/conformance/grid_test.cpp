// Every dtype, head size, option, group size and batch against the float64 reference: each axis
// alone, and random crossings of all of them.
#include "support/backends.hpp"

namespace keyfold::test {
namespace {

const std::vector<DType> kDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

struct HeadSize {
  std::int64_t head_dim, value_dim;
};
const std::vector<HeadSize> kHeadSizes = {
    {1, 1},     {7, 7},     {32, 32},   {40, 40},   {64, 64},   {80, 80}, {96, 96},  {128, 128},
    {192, 192}, {256, 256}, {512, 512}, {576, 512}, {192, 128}, {3, 65},  {576, 576}};

/// Sets one option of a case; the axis of options.
const std::vector<void (*)(Case&)> kOptions = {
    [](Case&) {},
    [](Case& c) { c.causal = true; },
    [](Case& c) { c.causal = true, c.q_offset = c.kv_len / 2; },
    [](Case& c) { c.q_offset = -c.q_len / 2, c.causal = true; },
    [](Case& c) { c.window.left = c.kv_len / 3; },
    [](Case& c) { c.window.right = 5; },
    [](Case& c) {
      c.window = {17, 3};
    },
    [](Case& c) { c.window.left = 64, c.causal = true; },
    [](Case& c) { c.softcap = 3.0f; },
    [](Case& c) { c.scale = 0.3f; },
    [](Case& c) { c.scale = -0.1f; },
    [](Case& c) { c.scale = 0.0f; },
    [](Case& c) { c.sinks = true; },
    [](Case& c) { c.mask = Mask::kBool; },
    [](Case& c) {
      c.mask = Mask::kBool, c.mask_broadcast = {true, true, true, false};
    },
    [](Case& c) {
      c.mask = Mask::kBool, c.mask_broadcast = {false, true, false, true};
    },
    [](Case& c) { c.mask = Mask::kAdditive; },
    [](Case& c) {
      c.mask = Mask::kAdditive, c.mask_broadcast = {true, false, false, false};
    },
    [](Case& c) { c.mask = Mask::kAdditiveSameDType; },
    [](Case& c) {
      c.mask = Mask::kAdditiveSameDType, c.mask_broadcast = {true, true, false, false};
    },
};
const std::vector<Data> kData = {Data::kNormal,     Data::kOutliers, Data::kAscending,
                                 Data::kDescending, Data::kNeedle,   Data::kEqual};

/// kv_lens with a full, an empty, a one-key and a ragged entry among them.
std::vector<std::int64_t> ragged(const Case& c, Rng& rng) {
  const std::vector<std::int64_t> ends = {c.kv_len, 0, std::min<std::int64_t>(1, c.kv_len)};
  std::vector<std::int64_t> lens;
  for (std::int64_t b = 0; b < c.batch; ++b)
    lens.push_back(rng.one_in(2) ? rng.between(0, c.kv_len) : rng.pick(ends));
  return lens;
}

class Grid : public BackendTest {};
KEYFOLD_FOR_EACH_BACKEND(Grid);

TEST_P(Grid, HeadSizes) {
  Rng rng("head sizes");
  for (std::size_t i = 0; i < kHeadSizes.size(); ++i)
    for (const DType dtype : dtypes_of(i))
      for (const std::int64_t q_len : {1, 9})
        expect_right({.dtype = dtype,
                      .q_len = q_len,
                      .kv_len = by_scale(70, 200, 1100),
                      .head_dim = kHeadSizes[i].head_dim,
                      .value_dim = kHeadSizes[i].value_dim},
                     rng);
}

TEST_P(Grid, Options) {
  Rng rng("options");
  for (const DType dtype : kDTypes)
    for (const auto& option : kOptions)
      for (const std::int64_t q_len : {1, 21}) {
        Case c{.dtype = dtype,
               .batch = 2,
               .num_heads = 4,
               .num_kv_heads = 2,
               .q_len = q_len,
               .kv_len = by_scale(90, 700, 1300),
               .head_dim = 32};
        option(c);
        expect_right(c, rng);
      }
}

TEST_P(Grid, Groups) {
  Rng rng("groups");
  for (const DType dtype : kDTypes)
    for (const std::int64_t group : {1, 4, 16, 32})
      for (const std::int64_t q_len : {1, 5, 40})
        expect_right({.dtype = dtype,
                      .num_heads = 32,
                      .num_kv_heads = 32 / group,
                      .q_len = q_len,
                      .kv_len = by_scale(33, 130, 600),
                      .head_dim = 16,
                      .causal = true},
                     rng);
}

TEST_P(Grid, Batches) {
  Rng rng("batches");
  for (const DType dtype : kDTypes)
    for (const std::int64_t batch : {1, 2, 3, 4})
      for (const bool causal : {false, true})
        for (const std::int64_t q_len : {1, 12}) {
          Case c{.dtype = dtype,
                 .batch = batch,
                 .num_heads = 4,
                 .num_kv_heads = 2,
                 .q_len = q_len,
                 .kv_len = by_scale(100, 600, 1500),
                 .head_dim = 24,
                 .causal = causal};
          c.kv_lens = ragged(c, rng);
          expect_right(c, rng);
        }
}

TEST_P(Grid, AdversarialData) {
  Rng rng("data");
  for (const DType dtype : kDTypes)
    for (const Data data : kData)
      for (const std::int64_t kv_len : {1, 1300})
        for (const std::int64_t q_len : {1, 18})
          expect_right(
              {.dtype = dtype, .q_len = q_len, .kv_len = kv_len, .head_dim = 40, .data = data},
              rng);
}

// So many that kernels which treat few rows apart do not.
TEST_P(Grid, ManyRows) {
  Rng rng("many rows");
  const std::vector<std::int64_t> dims = {64, 128, 256};
  for (std::size_t i = 0; i < dims.size(); ++i)
    for (const DType dtype : dtypes_of(i)) {
      Case c{.dtype = dtype,
             .num_heads = 8,
             .q_len = 150,
             .kv_len = 1700,
             .head_dim = dims[i],
             .value_dim = dims[i],
             .kv_lens = {1650}};
      rng.pick(kOptions)(c);
      rng.pick(kOptions)(c);
      RunOptions how;
      how.chunk_size = rng.between(1, 2000);
      expect_right(c, rng, how);
    }
}

TEST_P(Grid, RandomCrossings) {
  Rng rng("crossings");
  for (int n = 0; n < by_scale(25, 150, 600); ++n) {
    const HeadSize& size = rng.pick(kHeadSizes);
    const std::int64_t group = rng.pick<std::int64_t>({1, 1, 4, 16});
    const std::int64_t kv_heads = group == 16 ? 1 : rng.between(1, 3);
    Case c{.dtype = rng.pick(kDTypes),
           .batch = rng.between(1, 4),
           .num_heads = kv_heads * group,
           .num_kv_heads = kv_heads,
           .q_len = rng.one_in(3) ? 1 : rng.between(1, 40),
           .kv_len = rng.between(0, by_scale(80, 400, 1500)),
           .head_dim = size.head_dim,
           .value_dim = size.value_dim};
    for (int options = 0; options < 3; ++options) rng.pick(kOptions)(c);
    if (rng.one_in(2)) c.kv_lens = ragged(c, rng);
    c.layout = rng.pick<Layout>({Layout::kDense, Layout::kTransposed, Layout::kSliced});
    c.data = rng.pick(kData);
    RunOptions how;
    if (rng.one_in(2)) how.chunk_size = rng.between(1, 2000);
    if (rng.one_in(3)) how.budget_ms = 0.1;
    expect_right(c, rng, how);
  }
}

}  // namespace
}  // namespace keyfold::test

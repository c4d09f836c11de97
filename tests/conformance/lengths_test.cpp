// Lengths one below, at and one above every boundary: tile, split, chunk, threshold.
#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class Lengths : public BackendTest {};
KEYFOLD_FOR_EACH_BACKEND(Lengths);

TEST_P(Lengths, KeysAroundTilesAndSplits) {
  Rng rng("kv_len");
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const std::int64_t q_len : {1, 20}) {
      const std::int64_t split = split_len(dtype, q_len);
      std::vector<std::int64_t> edges = {16, 32, 64, 128, split, 2 * split};
      if (scale() == Scale::kTiny) edges = {16, 64, split};
      for (const std::int64_t edge : edges)
        for (const std::int64_t kv_len : {edge - 1, edge, edge + 1})
          for (const bool causal : {false, true})
            expect_right({.dtype = dtype,
                          .q_len = q_len,
                          .kv_len = kv_len,
                          .head_dim = 16,
                          .causal = causal},
                         rng);
    }
}

TEST_P(Lengths, QueriesAroundTiles) {
  Rng rng("q_len");
  for (const std::int64_t group : {1, 4})
    for (const std::int64_t q_len : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65})
      expect_right({.num_heads = group,
                    .num_kv_heads = 1,
                    .q_len = q_len,
                    .kv_len = by_scale(70, 300, 1100),
                    .head_dim = 16,
                    .causal = true},
                   rng);
}

TEST_P(Lengths, HeadSizesAroundVectors) {
  Rng rng("dims");
  const std::vector<std::int64_t> dims = {1, 2, 3, 15, 16, 17, 31, 33, 47, 63, 65, 127, 129, 575};
  for (std::size_t i = 0; i < dims.size(); ++i)
    for (const DType dtype : dtypes_of(i))
      expect_right({.dtype = dtype,
                    .q_len = 7,
                    .kv_len = 75,
                    .head_dim = dims[i],
                    .value_dim = 576 - dims[i]},
                   rng);
}

TEST_P(Lengths, ChunksOfEveryShape) {
  Rng rng("chunks");
  const std::int64_t split = split_len(DType::kFloat32, 10);
  const struct {
    std::int64_t kv_len, chunk_size;
  } shapes[] = {
      {2 * split + 1, 2 * split},          // the last chunk holds one key
      {split + 1, 1},                      // so does this one, and one split is the least
      {5 * split + split / 2, 2 * split},  // three unequal chunks
      {3 * split - 1, split},
      {3 * split, split},
      {3 * split + 1, split},
      {2 * split, 2 * split - 1},  // rounded up to two splits
      {2 * split, 100 * split},
  };
  for (const auto& shape : shapes)
    for (const std::int64_t q_len : {1, 10}) {
      SCOPED_TRACE(shape.chunk_size);
      RunOptions how;
      how.chunk_size = shape.chunk_size;
      expect_right({.q_len = q_len, .kv_len = shape.kv_len, .head_dim = 16, .causal = true}, rng,
                   how);
    }
}

TEST_P(Lengths, KeysAroundTheThreshold) {
  Rng rng("threshold");
  const std::int64_t split = split_len(DType::kFloat32, 10), threshold = 4 * split;
  for (const std::int64_t kv_len : {threshold - 1, threshold, threshold + 1}) {
    const Inputs inputs({.q_len = 10, .kv_len = kv_len, .head_dim = 16}, rng);
    RunOptions how;
    how.chunk_size = split;
    how.chunk_threshold = threshold;
    const Outputs got = run(inputs.call(), how);
    EXPECT_EQ(got.report.dispatches == 1, kv_len < threshold);
    expect_right(inputs.call(), got, all_rows(inputs.call().q));
  }
}

TEST_P(Lengths, MoreQueriesThanKeys) {
  Rng rng("long q");
  for (const std::int64_t kv_len : {0, 1, 5, 40})
    for (const bool sinks : {false, true})
      expect_right({.batch = 2,
                    .q_len = 60,
                    .kv_len = kv_len,
                    .head_dim = 16,
                    .causal = true,
                    .sinks = sinks},
                   rng);
}

TEST_P(Lengths, HeadsTooLargeSayWhatWorks) {
  Rng rng("large");
  const std::vector<DeviceInfo> all = devices();
  for (const DeviceInfo& device : all) {
    if (device.backend != GetParam()) continue;
    const Inputs inputs({.head_dim = device.max_head_dim + 1}, rng);
    try {
      run(inputs.call());
      ADD_FAILURE() << "was accepted";
    } catch (const RunError& e) {
      EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
      const std::string message = static_cast<const Error&>(e).what();
      for (const std::int64_t n : {device.max_head_dim, device.max_head_dim + 1})
        EXPECT_NE(message.find(std::to_string(n)), std::string::npos) << message;
    }
  }
}

}  // namespace
}  // namespace keyfold::test

// Attention of many ranks over MPI: every rank runs these tests, with the same data, and judges its
// own results.
#include <cstdlib>
#include <string>

#include "keyfold/mpi.hpp"
#include "ranks/shares.hpp"

namespace keyfold::test {
namespace {

class Mpi : public BackendTest {
 protected:
  Mpi() {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &num_ranks_);
  }

  /// Runs a spread call and judges this rank's rows.
  void expect_spread_right(const Call& call, const Spread& spread, ContextParallel& ranks) const {
    SCOPED_TRACE(testing::Message() << "rank " << rank_ << " of " << spread);
    RankCall part(call, spread, rank_);
    part.options.attention.run.backend = GetParam();
    part.options.attention.run.num_threads = 1;
    const ContextParallelReport report = part.run(ranks);
    EXPECT_EQ(report.kv_len, call.k.sizes[2]);
    const Outputs one = run(call);  // in which the others' rows stay as they are
    Outputs got = one;
    std::vector<std::int64_t> numbers;  // of this rank's rows, in the call
    const bool own = spread.queries == Queries::kOwn;
    for (const KeySpan& span :
         own ? spread.rows(rank_) : std::vector<KeySpan>{{0, call.q.sizes[2]}})
      for (std::int64_t row = span.begin; row < span.end; ++row) numbers.push_back(row);
    const auto in_call = [&](const Dims& i) {
      return Dims{i[0], i[1], numbers[static_cast<std::size_t>(i[2])], i[3]};
    };
    std::vector<RowId> rows;
    part.out.each([&](const Dims& i) { got.out.set(in_call(i), part.out.at(i)); });
    part.lse.each([&](const Dims& i) {
      got.lse.set(in_call(i), part.lse.at(i));
      rows.push_back({i[0], i[1], in_call(i)[2]});
    });
    if (spread.order == MergeOrder::kOrdered)
      EXPECT_TRUE(got.bytes() == one.bytes()) << "not the bits of one process";
    else if (!rows.empty())
      expect_right(call, got, rows);
  }

  int rank_ = 0, num_ranks_ = 1;
};
KEYFOLD_FOR_EACH_BACKEND(Mpi);

TEST_P(Mpi, AnyShareOfAnyCallIsRight) {
  ContextParallel ranks(mpi_transport(MPI_COMM_WORLD));
  ASSERT_EQ(ranks.rank(), rank_);
  ASSERT_EQ(ranks.num_ranks(), num_ranks_);
  Rng rng("mpi");
  for (int n = 0; n < by_scale(8, 20, 40); ++n) {
    Case c{.dtype = rng.pick<DType>({DType::kFloat32, DType::kFloat16, DType::kBFloat16}),
           .batch = rng.between(1, 2),
           .num_heads = 4,
           .num_kv_heads = 2,
           .q_len = rng.one_in(2) ? 1 : rng.between(2, 40),
           .kv_len = rng.between(0, 5000),
           .head_dim = 32};
    c.value_dim = rng.one_in(2) ? 20 : 0;
    c.causal = rng.one_in(2);
    if (rng.one_in(4)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(4)) c.softcap = 5;
    if (rng.one_in(3)) c.mask = rng.one_in(2) ? Mask::kAdditive : Mask::kBool;
    c.sinks = rng.one_in(2);
    if (rng.one_in(3))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    SCOPED_TRACE(testing::Message() << c);
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    expect_spread_right(call, Spread::random(rng, call, num_ranks_, split_len(call)), ranks);
  }
}

TEST_P(Mpi, LargeBlocksOfManyRows) {
  ContextParallel ranks(mpi_transport(MPI_COMM_WORLD));
  Rng rng("large");
  const Inputs inputs({.num_heads = 8,
                       .num_kv_heads = 2,
                       .q_len = 150,
                       .kv_len = by_scale<std::int64_t>(2000, 4000, 8000),
                       .head_dim = 32,
                       .causal = true},
                      rng);
  const Call call = inputs.call();
  for (const Queries queries : {Queries::kReplicated, Queries::kOwn})
    for (const MergeOrder order : {MergeOrder::kReduce, MergeOrder::kOrdered}) {
      Spread spread = Spread::random(rng, call, num_ranks_, split_len(call));
      spread.queries = queries;
      spread.order = order;
      spread.block_bytes = 300'000;
      expect_spread_right(call, spread, ranks);
    }
}

TEST_P(Mpi, DisagreementEndsAllAndTheNextCallWorks) {
  if (num_ranks_ == 1) return;
  ContextParallel ranks(mpi_transport(MPI_COMM_WORLD));
  Rng rng("disagree");
  const Inputs inputs({.q_len = 3, .kv_len = 3000, .head_dim = 16}, rng);
  const Call call = inputs.call();
  const Spread spread = Spread::random(rng, call, num_ranks_, split_len(call));
  RankCall part(call, spread, rank_);
  part.options.attention.run.backend = GetParam();
  if (rank_ == num_ranks_ - 1) part.options.attention.softcap = 3;
  EXPECT_THROW(part.run(ranks), InvalidArgument);
  EXPECT_TRUE(part.untouched());
  expect_spread_right(call, spread, ranks);
}

}  // namespace
}  // namespace keyfold::test

int main(int argc, char** argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  std::uint64_t seed = 0;
  if (rank == 0) seed = keyfold::test::base_seed();
  MPI_Bcast(&seed, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
  setenv("KEYFOLD_TEST_SEED", std::to_string(seed).c_str(), 1);
  testing::InitGoogleTest(&argc, argv);
  if (rank != 0) {
    testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
    listeners.Release(listeners.default_result_printer());
  }
  int failed = RUN_ALL_TESTS();
  if (failed != 0 && rank != 0) std::printf("rank %d: tests FAILED\n", rank);
  MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return failed;
}

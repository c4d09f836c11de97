// Merging by reductions.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "ranks/merge.hpp"

namespace keyfold::ranks {
namespace {

using Reduction = Transport::Reduction;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// A block on its way. States of its slices follow each other.
struct Parcel {
  Block block;
  std::vector<std::byte> q_mine, q_all;  // rows of their own: a share for each rank
  std::vector<float> local, most;        // maxima; behind `most`, the mark of a failure
  std::vector<float> sums, mine;         // l and o, slice by slice; those of this rank's slice
  std::vector<std::int64_t> counts;      // floats of each rank's slice in `sums`
  Channel::Operation queries, maximum, sum;

  /// State of the i-th slice, its m in `local`.
  SliceState state(const core::Problem& problem, std::size_t i) {
    std::int64_t states = 0;
    for (std::size_t before = 0; before < i; ++before) states += block[before].states(problem);
    float* const l = sums.data() + states * (problem.shape.value_dim + 1);
    return {local.data() + states, l, l + block[i].states(problem)};
  }
};

class Reductions {
 public:
  Reductions(Job& job, std::int64_t block_bytes)
      : job_(job),
        channel_(job.channel()),
        problem_(job.problem()),
        blocks_(plan_blocks(problem_, job.owned(), block_bytes)) {}

  void run() {
    // Two blocks are on their way while a third is computed: its maximum, and sums.
    std::shared_ptr<Parcel> maximum, sums;
    std::shared_ptr<Parcel> next = blocks_.empty() ? nullptr : begin(0);
    for (std::size_t i = 0; i < blocks_.size() + 2; ++i) {
      std::shared_ptr<Parcel> computed = std::move(next);
      if (i + 1 < blocks_.size()) next = begin(i + 1);
      if (computed) compute(computed);
      if (sums) finish(*sums);
      sums = std::move(maximum);
      if (sums) rescale(sums);
      maximum = std::move(computed);
    }
  }

 private:
  /// Makes a block and sends its queries on their way.
  std::shared_ptr<Parcel> begin(std::size_t number) const {
    auto parcel = std::make_shared<Parcel>();
    parcel->block = blocks_[number];
    if (!job_.own_rows()) return parcel;
    const std::int64_t share = query_share(*parcel);
    parcel->q_mine.resize(static_cast<std::size_t>(share));
    parcel->q_all.resize(static_cast<std::size_t>(share * channel_.num_ranks()));
    std::byte* next_slice = parcel->q_mine.data();
    for (const Slice& slice : parcel->block) {
      if (slice.owner != channel_.rank()) continue;
      job_.copy_queries(slice, next_slice);
      next_slice += query_bytes(slice);
    }
    parcel->queries =
        channel_.all_gather(parcel, parcel->q_mine.data(), parcel->q_all.data(), share);
    return parcel;
  }

  std::int64_t query_bytes(const Slice& slice) const {
    return slice.states(problem_) * problem_.shape.head_dim * size_of(problem_.shape.dtype);
  }
  /// Room for the queries of any rank.
  std::int64_t query_share(const Parcel& parcel) const {
    std::int64_t most = 0, bytes = 0;
    int owner = Slice::kAll;
    for (const Slice& slice : parcel.block) {
      bytes = (slice.owner == owner ? bytes : 0) + query_bytes(slice);
      owner = slice.owner;
      most = std::max(most, bytes);
    }
    return most;
  }

  void compute(const std::shared_ptr<Parcel>& shared) {
    Parcel& parcel = *shared;
    if (parcel.queries) channel_.wait(parcel.queries, "the other ranks' queries");
    std::int64_t states = 0;
    parcel.counts.assign(static_cast<std::size_t>(channel_.num_ranks()), 0);
    const std::int64_t width = problem_.shape.value_dim + 1;
    for (const Slice& slice : parcel.block) {
      states += slice.states(problem_);
      if (slice.owner != Slice::kAll) {
        parcel.counts[static_cast<std::size_t>(slice.owner)] += slice.states(problem_) * width;
      }
    }
    parcel.local.resize(static_cast<std::size_t>(states));
    parcel.sums.resize(static_cast<std::size_t>(states * width));
    int owner = Slice::kAll;
    const std::byte* q = nullptr;
    for (std::size_t i = 0; i < parcel.block.size(); ++i) {
      const Slice& slice = parcel.block[i];
      if (slice.owner != owner) q = parcel.q_all.data() + slice.owner * query_share(parcel);
      owner = slice.owner;
      job_.compute(slice, q, job_.segments(), parcel.state(problem_, i));
      if (q != nullptr) q += query_bytes(slice);
    }
    parcel.q_mine = parcel.q_all = {};
    parcel.most = parcel.local;
    // A maximum of NaN is whatever a transport makes of it. It stays in the sums.
    for (float& m : parcel.most) m = std::isnan(m) ? kNothing : m;
    parcel.most.push_back(job_.mark());
    parcel.maximum = channel_.all_reduce(
        shared, parcel.most.data(), static_cast<std::int64_t>(parcel.most.size()), Reduction::kMax);
  }

  /// Rescales the sums to the maximum of all ranks and sends them on their way.
  void rescale(const std::shared_ptr<Parcel>& shared) {
    Parcel& parcel = *shared;
    channel_.wait(parcel.maximum, "the other ranks' maxima");
    if (parcel.most.back() > 0) {
      // All are here, as all have begun the same: nothing is left on its way for the next call.
      channel_.wait_all("the other ranks to end the call");
      job_.throw_failure();
    }
    for (std::size_t i = 0; i < parcel.block.size(); ++i) {
      const SliceState state = parcel.state(problem_, i);
      const float* const most = parcel.most.data() + (state.m - parcel.local.data());
      const std::int64_t dim = problem_.shape.value_dim;
      for (std::int64_t row = 0; row < parcel.block[i].states(problem_); ++row) {
        // A weight of 0 leaves even Inf out.
        const float weight = state.m[row] == kNothing ? 0 : std::exp(state.m[row] - most[row]);
        const auto scale = [weight](float& x) { x = weight == 0 ? 0 : weight * x; };
        scale(state.l[row]);
        for (std::int64_t d = 0; d < dim; ++d) scale(state.o[row * dim + d]);
      }
    }
    if (!job_.own_rows()) {
      parcel.sum =
          channel_.all_reduce(shared, parcel.sums.data(),
                              static_cast<std::int64_t>(parcel.sums.size()), Reduction::kSum);
      return;
    }
    parcel.mine.resize(
        static_cast<std::size_t>(parcel.counts[static_cast<std::size_t>(channel_.rank())]));
    parcel.sum =
        channel_.reduce_scatter(shared, parcel.sums.data(), parcel.mine.data(), parcel.counts);
  }

  void finish(Parcel& parcel) {
    channel_.wait(parcel.sum, "the other ranks' sums");
    float* mine = parcel.mine.data();
    for (std::size_t i = 0; i < parcel.block.size(); ++i) {
      const Slice& slice = parcel.block[i];
      SliceState state = parcel.state(problem_, i);
      state.m = parcel.most.data() + (state.m - parcel.local.data());
      if (slice.owner == channel_.rank()) {
        const std::int64_t states = slice.states(problem_);
        state.l = mine;
        state.o = mine + states;
        mine += states * (problem_.shape.value_dim + 1);
      }
      job_.finish(slice, state);
    }
  }

  Job& job_;
  Channel& channel_;
  const core::Problem& problem_;
  std::vector<Block> blocks_;
};

}  // namespace

void merge_by_reductions(Job& job, std::int64_t block_bytes) { Reductions(job, block_bytes).run(); }

}  // namespace keyfold::ranks

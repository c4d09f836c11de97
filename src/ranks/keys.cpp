// Keys that visit the ranks.
#include <algorithm>
#include <deque>
#include <memory>
#include <vector>

#include "core/copy_tensor.hpp"
#include "ranks/merge.hpp"

namespace keyfold::ranks {
namespace {

/// Keys that are on their way beside those that are folded.
constexpr std::size_t kAhead = 2;

/// Keys and values of a part of a segment, dense, on their way from the rank that has them.
struct Visit {
  const Segment* segment = nullptr;
  KeySpan keys;
  std::vector<std::byte> data;  // keys, then values
  TensorView k, v;
  Channel::Operation arrival;
};

class KeyVisits {
 public:
  KeyVisits(Job& job, std::int64_t block_bytes)
      : job_(job), channel_(job.channel()), problem_(job.problem()) {
    const AttentionShape& s = problem_.shape;
    const std::int64_t key_bytes =
        s.batch * s.num_kv_heads * (s.head_dim + s.value_dim) * size_of(s.dtype);
    const std::int64_t split_len = agreed_most(static_cast<float>(job.split_len()));
    const std::int64_t splits = std::max<std::int64_t>(1, block_bytes / (key_bytes * split_len));
    for (const Segment& segment : job.segments()) {
      for (std::int64_t begin = segment.keys.begin; begin < segment.keys.end;) {
        const KeySpan keys{begin, std::min(segment.keys.end, begin + splits * split_len)};
        begin = keys.end;
        // Keys that no row of any rank sees stay where they are.
        if (problem_.rows_seeing({keys.begin, keys.end}, {0, s.q_len}).size() > 0)
          parts_.push_back({&segment, keys});
      }
    }
  }

  void run() {
    const std::int64_t own_passes = job_.own_passes();
    // A rank whose rows take more memory than it may use takes them one after another, and all keys
    // visit again.
    const std::int64_t passes = agreed_most(static_cast<float>(own_passes));
    for (std::int64_t pass = 0; pass < passes; ++pass) {
      const bool takes_part = pass < own_passes;
      if (takes_part) job_.begin_pass(pass);
      run_pass(takes_part);
      if (takes_part) job_.finish_pass();
      if (agreed_most(job_.mark()) > 0) job_.throw_failure();
    }
  }

 private:
  struct Part {
    const Segment* segment;
    KeySpan keys;
  };

  std::int64_t agreed_most(float mine) {
    const auto most = std::make_shared<float>(mine);
    channel_.wait(channel_.all_reduce(most, most.get(), 1, Transport::Reduction::kMax),
                  "the other ranks");
    return static_cast<std::int64_t>(*most);
  }

  void run_pass(bool takes_part) {
    std::deque<std::shared_ptr<Visit>> under_way;
    std::size_t next = 0;
    for (std::size_t number = 0; number < parts_.size(); ++number) {
      while (next < std::min(parts_.size(), number + 1 + kAhead))
        under_way.push_back(begin(parts_[next++]));
      const std::shared_ptr<Visit> visit = std::move(under_way.front());
      under_way.pop_front();
      channel_.wait(visit->arrival, "the keys of rank " + std::to_string(visit->segment->rank));
      if (takes_part) job_.fold_own(visit->k, visit->v, visit->keys);
    }
  }

  std::shared_ptr<Visit> begin(const Part& part) const {
    const AttentionShape& s = problem_.shape;
    const std::int64_t count = part.keys.end - part.keys.begin;
    auto visit = std::make_shared<Visit>();
    visit->segment = part.segment;
    visit->keys = part.keys;
    const Dims k_sizes{s.batch, s.num_kv_heads, count, s.head_dim};
    const Dims v_sizes{s.batch, s.num_kv_heads, count, s.value_dim};
    const std::int64_t rows = s.batch * s.num_kv_heads * count * size_of(s.dtype);
    visit->data.resize(static_cast<std::size_t>(rows * (s.head_dim + s.value_dim)));
    std::byte* const values = visit->data.data() + rows * s.head_dim;
    visit->k = {visit->data.data(), s.dtype, k_sizes};
    visit->v = {values, s.dtype, v_sizes};
    if (part.segment->rank == channel_.rank()) {
      core::copy_tensor(job_.keys_of(*part.segment, part.keys),
                        {visit->data.data(), s.dtype, k_sizes});
      core::copy_tensor(job_.values_of(*part.segment, part.keys), {values, s.dtype, v_sizes});
    }
    visit->arrival =
        channel_.broadcast(visit, visit->data.data(), static_cast<std::int64_t>(visit->data.size()),
                           part.segment->rank);
    return visit;
  }

  Job& job_;
  Channel& channel_;
  const core::Problem& problem_;
  std::vector<Part> parts_;
};

}  // namespace

void fold_passing_keys(Job& job, std::int64_t block_bytes) { KeyVisits(job, block_bytes).run(); }

}  // namespace keyfold::ranks

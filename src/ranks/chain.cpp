// Merging in the order of the keys.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "keyfold/error.hpp"
#include "ranks/merge.hpp"

namespace keyfold::ranks {
namespace {

/// Blocks for each rank, where rows and heads are enough: the chain is full but for its ends.
constexpr std::int64_t kBlocksPerRank = 4;
/// Blocks whose results a rank has on their way.
constexpr std::size_t kMostResults = 4;
constexpr int kStateTag = 0;

/// What precedes a state.
struct Head {
  float failed;
  std::uint32_t kernel;  ///< of the bits in it; 0: of none yet
};
constexpr std::int64_t kHeadFloats = sizeof(Head) / sizeof(float);

/// A block on its way along the ranks: a Head, then the state of its slice.
struct Letter {
  Slice slice;
  std::vector<float> numbers;
  Channel::Operation under_way;

  Head head() const {
    Head head{};
    std::memcpy(&head, numbers.data(), sizeof head);
    return head;
  }
  void set_head(const Head& head) { std::memcpy(numbers.data(), &head, sizeof head); }
  std::int64_t bytes() const { return static_cast<std::int64_t>(numbers.size() * sizeof(float)); }
};

class Chain {
 public:
  Chain(Job& job, std::int64_t block_bytes)
      : job_(job),
        channel_(job.channel()),
        problem_(job.problem()),
        segments_(job.segments()),
        kernel_(static_cast<std::uint32_t>(digest_of(job.kernel())) | 1) {
    // Without a key, one visit of nobody's keys still makes the results.
    if (segments_.empty()) segments_.push_back({});
    const AttentionShape& s = problem_.shape;
    const std::int64_t all = s.batch * s.num_heads * s.q_len * (s.value_dim + 2) * 4;
    const std::int64_t even = all / (kBlocksPerRank * channel_.num_ranks());
    for (Block& block :
         plan_blocks(problem_, job.owned(), std::max<std::int64_t>(1, std::min(block_bytes, even))))
      slices_.push_back(block.front());
  }

  void run() {
    letters_.resize(slices_.size());
    // A block is in memory from its first visit to its last; with many stripes these are far apart.
    const std::size_t most = kBlocksPerRank * static_cast<std::size_t>(channel_.num_ranks());
    const std::size_t wave = segments_.size() <= most ? slices_.size() : most;
    for (std::size_t first = 0; first < slices_.size(); first += wave)
      run_wave(first, std::min(slices_.size(), first + wave));
    while (!results_.empty()) finish_oldest();
    channel_.wait_all("the other ranks to take what was sent");
    const auto mark = std::make_shared<float>(job_.mark());
    channel_.wait(channel_.all_reduce(mark, mark.get(), 1, Transport::Reduction::kMax),
                  "the other ranks to end the call");
    if (*mark > 0) job_.throw_failure();
  }

 private:
  /// Visit s of the b-th block is made in step s + b. All ranks go through the same steps in the
  /// same order: what is sent in one step is received in the next, so that waiting for messages of
  /// the step before the last, and only for these, never ends up in a circle.
  void run_wave(std::size_t begin, std::size_t end) {
    const std::size_t blocks = end - begin, visits = segments_.size();
    for (std::size_t step = 0; step + 1 < blocks + visits; ++step, ++step_) {
      while (!sent_.empty() && sent_.front().step + 2 <= step_) {
        channel_.wait(sent_.front().operation, "another rank to take a state");
        sent_.pop_front();
      }
      const std::size_t first = step < blocks ? 0 : step - blocks + 1;
      for (std::size_t s = first; s < std::min(visits, step + 1); ++s) visit(begin + step - s, s);
    }
  }

  int owner_of(std::size_t segment) const { return segments_[segment].rank; }

  void visit(std::size_t number, std::size_t segment) {
    if (segment == 0) begin(number);
    const std::size_t last = segments_.size() - 1;
    const std::shared_ptr<Letter> letter = letters_[number];
    if (owner_of(segment) == channel_.rank()) {
      if (segment > 0 && owner_of(segment - 1) != channel_.rank()) {
        receive(letter, owner_of(segment - 1));
      }
      fold(*letter, segment);
      if (segment < last && owner_of(segment + 1) != channel_.rank()) {
        send(letter, owner_of(segment + 1));
      }
    }
    if (segment == last) end(number);
  }

  void begin(std::size_t number) {
    auto letter = std::make_shared<Letter>();
    letter->slice = slices_[number];
    letter->numbers.resize(
        static_cast<std::size_t>(kHeadFloats + job_.state_floats(letter->slice)));
    letters_[number] = std::move(letter);
  }

  SliceState state_of(Letter& letter) const {
    return job_.state_at(letter.slice, letter.numbers.data() + kHeadFloats);
  }

  void fold(Letter& letter, std::size_t segment) {
    Head head = letter.head();
    if (head.failed > 0) return;  // nobody will use it
    if (head.kernel != 0 && head.kernel != kernel_) {
      job_.attempt([&] {
        throw InvalidArgument("order",
                              "expected ranks of the same backend and kernel, got others "
                              "than " +
                                  job_.kernel() + "; use MergeOrder::kReduce");
      });
    }
    job_.compute(letter.slice, nullptr, std::span(segments_).subspan(segment, 1), state_of(letter),
                 segment > 0);
    letter.set_head({job_.mark(), kernel_});
  }

  void receive(const std::shared_ptr<Letter>& letter, int from) {
    channel_.wait(
        channel_.receive(letter, letter->numbers.data(), letter->bytes(), from, kStateTag),
        "the state of rank " + std::to_string(from));
  }

  void send(const std::shared_ptr<Letter>& letter, int to) {
    sent_.push_back(
        {channel_.send(letter, letter->numbers.data(), letter->bytes(), to, kStateTag), step_});
  }

  /// A block has visited all: its results go where they belong.
  void end(std::size_t number) {
    const std::shared_ptr<Letter> letter = std::move(letters_[number]);
    letter->under_way = channel_.broadcast(letter, letter->numbers.data(), letter->bytes(),
                                           owner_of(segments_.size() - 1));
    results_.push_back(letter);
    if (results_.size() > kMostResults) finish_oldest();
  }

  void finish_oldest() {
    const std::shared_ptr<Letter> letter = std::move(results_.front());
    results_.pop_front();
    channel_.wait(letter->under_way, "the merged state");
    if (letter->head().failed == 0) job_.finish(letter->slice, state_of(*letter));
  }

  Job& job_;
  Channel& channel_;
  const core::Problem& problem_;
  std::vector<Segment> segments_;
  std::uint32_t kernel_;
  std::vector<Slice> slices_;
  std::vector<std::shared_ptr<Letter>> letters_;  // by block, from its first visit to its last
  std::deque<std::shared_ptr<Letter>> results_;
  struct Sent {
    Channel::Operation operation;
    std::size_t step;
  };
  std::deque<Sent> sent_;
  std::size_t step_ = 0;  // of all waves
};

}  // namespace

void merge_in_order(Job& job, std::int64_t block_bytes) { Chain(job, block_bytes).run(); }

}  // namespace keyfold::ranks

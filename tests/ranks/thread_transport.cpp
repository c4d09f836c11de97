#include "ranks/thread_transport.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <tuple>

namespace keyfold::test {
namespace {

using Bytes = std::vector<std::byte>;

/// What all ranks share.
class Hub {
 public:
  explicit Hub(int num_ranks) : begun_(static_cast<std::size_t>(num_ranks)) {}

  struct Part {
    const void* from;
    void* to;
    std::int64_t bytes;
  };
  /// Given the parts of all ranks, writes their results.
  using Meet = std::function<void(const std::vector<Part>&)>;

  /// The next collective operation of this rank; its number.
  std::size_t join(int rank, const std::string& kind, const Part& part, const Meet& meet) {
    const std::lock_guard lock(mutex_);
    const std::size_t number = begun_[static_cast<std::size_t>(rank)]++;
    if (meetings_.size() == number) meetings_.push_back({kind, {}, begun_.size()});
    Meeting& meeting = meetings_[number];
    if (meeting.kind != kind) throw std::logic_error(kind + " where others do " + meeting.kind);
    meeting.parts.resize(begun_.size());
    meeting.parts[static_cast<std::size_t>(rank)] = part;
    if (--meeting.missing == 0) meet(meeting.parts);
    return number;
  }
  bool met(std::size_t number) {
    const std::lock_guard lock(mutex_);
    return meetings_[number].missing == 0;
  }

  using Line = std::tuple<int, int, int>;  // from, to, tag
  /// The number of the message, which is taken when the other side receives it, as large ones are.
  std::size_t send(const Line& line, const void* data, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto* const first = static_cast<const std::byte*>(data);
    std::vector<Bytes>& sent = lines_[line].sent;
    sent.emplace_back(first, first + bytes);
    return sent.size() - 1;
  }
  bool taken(const Line& line, std::size_t number) {
    const std::lock_guard lock(mutex_);
    return lines_[line].expected > number;
  }
  /// The number of the message that the next receive on the line will get.
  std::size_t expect(const Line& line) {
    const std::lock_guard lock(mutex_);
    return lines_[line].expected++;
  }
  bool receive(const Line& line, std::size_t number, void* data, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const std::vector<Bytes>& sent = lines_[line].sent;
    if (sent.size() <= number) return false;
    if (static_cast<std::int64_t>(sent[number].size()) != bytes)
      throw std::logic_error("a message of another size");
    std::copy(sent[number].begin(), sent[number].end(), static_cast<std::byte*>(data));
    return true;
  }

 private:
  struct Meeting {
    std::string kind;
    std::vector<Part> parts;
    std::size_t missing;
  };
  std::mutex mutex_;
  std::vector<std::size_t> begun_;
  std::deque<Meeting> meetings_;
  struct Messages {
    std::vector<Bytes> sent;
    std::size_t expected = 0;
  };
  std::map<Line, Messages> lines_;
};

class Poll : public Transport::Request {
 public:
  explicit Poll(std::function<bool()> poll) : poll_(std::move(poll)) {}
  bool done() override { return done_ = done_ || poll_(); }

 private:
  std::function<bool()> poll_;
  bool done_ = false;
};

class ThreadTransport : public Transport {
 public:
  ThreadTransport(std::shared_ptr<Hub> hub, int rank, int num_ranks, const Silence& silence)
      : hub_(std::move(hub)), rank_(rank), num_ranks_(num_ranks), silence_(silence) {}

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  Pending all_gather(const void* mine, void* all, std::int64_t bytes) override {
    return join("all_gather " + std::to_string(bytes), {mine, all, bytes}, [](const auto& parts) {
      for (const Hub::Part& to : parts) {
        auto* next = static_cast<std::byte*>(to.to);
        for (const Hub::Part& from : parts) {
          if (from.bytes > 0) std::memcpy(next, from.from, static_cast<std::size_t>(from.bytes));
          next += from.bytes;
        }
      }
    });
  }
  Pending all_reduce(float* values, std::int64_t count, Reduction reduction) override {
    const bool max = reduction == Reduction::kMax;
    return join((max ? "maximum " : "sum ") + std::to_string(count), {values, values, count},
                [max](const auto& parts) {
                  const std::vector<float> all = reduce(parts, max);
                  for (const Hub::Part& to : parts)
                    std::copy(all.begin(), all.end(), static_cast<float*>(to.to));
                });
  }
  Pending reduce_scatter(const float* values, float* mine,
                         std::span<const std::int64_t> counts) override {
    std::int64_t all = 0;
    std::string kind = "reduce_scatter";
    for (const std::int64_t count : counts) all += count, kind += ' ' + std::to_string(count);
    return join(kind, {values, mine, all},
                [counts = std::vector(counts.begin(), counts.end())](const auto& parts) {
                  const std::vector<float> sums = reduce(parts, false);
                  auto next = sums.begin();
                  for (std::size_t rank = 0; rank < parts.size(); ++rank) {
                    std::copy_n(next, counts[rank], static_cast<float*>(parts[rank].to));
                    next += counts[rank];
                  }
                });
  }
  Pending broadcast(void* data, std::int64_t bytes, int root) override {
    return join("broadcast " + std::to_string(bytes) + " from " + std::to_string(root),
                {data, data, bytes}, [root](const auto& parts) {
                  const Hub::Part& from = parts[static_cast<std::size_t>(root)];
                  for (const Hub::Part& to : parts) {
                    if (to.to != from.from && to.bytes > 0)
                      std::memcpy(to.to, from.from, static_cast<std::size_t>(to.bytes));
                  }
                });
  }
  Pending send(const void* data, std::int64_t bytes, int to, int tag) override {
    count();
    const Hub::Line line{rank_, to, tag};
    return begun([hub = hub_, line, number = hub_->send(line, data, bytes)] {
      return hub->taken(line, number);
    });
  }
  Pending receive(void* data, std::int64_t bytes, int from, int tag) override {
    count();
    const Hub::Line line{from, rank_, tag};
    return begun([hub = hub_, line, number = hub_->expect(line), data, bytes] {
      return hub->receive(line, number, data, bytes);
    });
  }

 private:
  static std::vector<float> reduce(const std::vector<Hub::Part>& parts, bool max) {
    std::vector<float> all(static_cast<std::size_t>(parts.front().bytes), max ? -INFINITY : 0.0f);
    for (const Hub::Part& part : parts) {
      const auto* const values = static_cast<const float*>(part.from);
      for (std::size_t i = 0; i < all.size(); ++i)
        all[i] = max ? std::max(all[i], values[i]) : all[i] + values[i];
    }
    return all;
  }
  Pending join(const std::string& kind, const Hub::Part& part, const Hub::Meet& meet) {
    count();
    const std::size_t number = hub_->join(rank_, kind, part, meet);
    return begun([hub = hub_, number] { return hub->met(number); });
  }
  void count() {
    silent_ = silence_.rank == rank_ && silence_.after-- == 0;
    if (silent_ && !silence_.in_done) throw FellSilent();
  }
  Pending begun(std::function<bool()> poll) const {
    if (silent_) poll = []() -> bool { throw FellSilent(); };
    return std::make_unique<Poll>(std::move(poll));
  }

  std::shared_ptr<Hub> hub_;
  int rank_, num_ranks_;
  Silence silence_;
  bool silent_ = false;
};

}  // namespace

std::vector<std::exception_ptr> on_ranks(int num_ranks,
                                         const std::function<void(ContextParallel&)>& body,
                                         const Silence& silence) {
  const auto hub = std::make_shared<Hub>(num_ranks);
  std::vector<std::exception_ptr> thrown(static_cast<std::size_t>(num_ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        ContextParallel ranks(std::make_unique<ThreadTransport>(hub, rank, num_ranks, silence));
        body(ranks);
      } catch (...) {
        thrown[static_cast<std::size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return thrown;
}

}  // namespace keyfold::test

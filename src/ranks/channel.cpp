// Polling with a deadline.
#include "ranks/channel.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <mutex>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include "keyfold/error.hpp"

namespace keyfold::ranks {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLifeTag = 1023;  ///< of signs of life; the others are below
/// How much longer than the timeout a rank waits for signs of life: others may wait since later.
constexpr double kLifeShare = 0.2;
constexpr int kSpins = 200;  ///< polls before each rests: a message on one machine takes less

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Calls done() until it is true or the time is over; returns which.
template <class Done>
bool poll(double seconds, const Done& done) {
  const auto start = Clock::now();
  for (int spin = 0; !done(); ++spin) {
    if (seconds_since(start) > seconds) return false;
    if (spin < kSpins) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(spin - kSpins, 100)));
    }
  }
  return true;
}

/// Keeps what was given up: whatever carries it may still write there.
void bury(std::shared_ptr<const void> it) {
  static std::mutex mutex;
  static auto* const graves = new std::vector<std::shared_ptr<const void>>();  // never destroyed
  const std::lock_guard lock(mutex);
  graves->push_back(std::move(it));
}

}  // namespace

bool Channel::give_up() noexcept {
  const auto ended = [](const UnderWay& it) {
    try {
      return it.operation->done();
    } catch (...) {
      return false;  // nobody knows
    }
  };
  std::erase_if(under_way_, ended);
  const bool none = under_way_.empty();
  for (UnderWay& it : under_way_) {
    bury(std::move(it.operation));
    bury(std::move(it.owner));
  }
  under_way_.clear();
  return none;
}

Channel::Operation Channel::begin(Owner owner, Transport::Pending pending, std::int64_t bytes) {
  under_way_.push_back({std::move(pending), std::move(owner)});
  messages_ += 1;
  message_bytes_ += bytes;
  return under_way_.back().operation;
}

Channel::Operation Channel::all_gather(Owner owner, const void* mine, void* all,
                                       std::int64_t bytes) {
  return begin(std::move(owner), transport_.all_gather(mine, all, bytes),
               bytes * (num_ranks() + 1));
}

Channel::Operation Channel::all_reduce(Owner owner, float* values, std::int64_t count,
                                       Transport::Reduction reduction) {
  return begin(std::move(owner), transport_.all_reduce(values, count, reduction), 2 * count * 4);
}

Channel::Operation Channel::reduce_scatter(Owner owner, const float* values, float* mine,
                                           std::span<const std::int64_t> counts) {
  std::int64_t all = counts[static_cast<std::size_t>(rank())];
  for (const std::int64_t count : counts) all += count;
  return begin(std::move(owner), transport_.reduce_scatter(values, mine, counts), 4 * all);
}

Channel::Operation Channel::broadcast(Owner owner, void* data, std::int64_t bytes, int root) {
  return begin(std::move(owner), transport_.broadcast(data, bytes, root), bytes);
}

Channel::Operation Channel::send(Owner owner, const void* data, std::int64_t bytes, int to,
                                 int tag) {
  return begin(std::move(owner), transport_.send(data, bytes, to, tag), bytes);
}

Channel::Operation Channel::receive(Owner owner, void* data, std::int64_t bytes, int from,
                                    int tag) {
  return begin(std::move(owner), transport_.receive(data, bytes, from, tag), bytes);
}

void Channel::poke() {
  // One by one, as done() may throw, which std::erase_if would not outlive.
  for (auto it = under_way_.begin(); it != under_way_.end();) {
    it = it->operation->done() ? under_way_.erase(it) : std::next(it);
  }
}

void Channel::wait(const Operation& operation, const std::string& what) {
  const auto start = Clock::now();
  // All are driven on, as one may need that another goes on elsewhere.
  const bool done = poll(timeout_seconds_, [&] {
    poke();
    return operation->done();
  });
  waiting_seconds_ += seconds_since(start);
  if (done) return;
  const std::vector<int> silent = silent_ranks();
  std::ostringstream message;
  message << "rank " << rank() << " waited for " << timeout_seconds_ << " s for " << what << "; ";
  if (silent.empty()) {
    message << "all ranks answer, but they do not go on";
  } else {
    message << "no answer from rank" << (silent.size() > 1 ? "s" : "");
    for (std::size_t i = 0; i < silent.size(); ++i) message << (i ? ", " : " ") << silent[i];
  }
  message << ". End this process: the ranks can't work together any more";
  throw PeerError(message.str(), silent);
}

void Channel::wait_all(const std::string& what) {
  while (!under_way_.empty()) {
    const Operation oldest = under_way_.front().operation;
    wait(oldest, what);
  }
}

std::vector<int> Channel::silent_ranks() {
  const auto signs = std::make_shared<std::vector<char>>(2 * static_cast<std::size_t>(num_ranks()));
  std::vector<std::pair<int, Operation>> awaited;
  for (int other = 0; other < num_ranks(); ++other) {
    if (other == rank()) continue;
    char* const sign = &(*signs)[2 * static_cast<std::size_t>(other)];
    send(signs, sign, 1, other, kLifeTag);
    awaited.emplace_back(other, receive(signs, sign + 1, 1, other, kLifeTag));
  }
  poll(std::max(1.0, kLifeShare * timeout_seconds_), [&] {
    poke();
    std::erase_if(awaited, [](const auto& it) { return it.second->done(); });
    return awaited.empty();
  });
  std::vector<int> silent;
  for (const auto& it : awaited) silent.push_back(it.first);
  return silent;
}

}  // namespace keyfold::ranks

// Operations under way between the ranks: begun, driven on while this rank computes, waited for in
// bounded time.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "keyfold/transport.hpp"

namespace keyfold::ranks {

class Channel {
 public:
  Channel(Transport& transport, double timeout_seconds)
      : transport_(transport), timeout_seconds_(timeout_seconds) {}
  ~Channel() { give_up(); }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  using Operation = std::shared_ptr<Transport::Request>;

  int rank() const { return transport_.rank(); }
  int num_ranks() const { return transport_.num_ranks(); }

  // Each begins an operation on memory that `owner` keeps alive.
  using Owner = std::shared_ptr<const void>;
  Operation all_gather(Owner owner, const void* mine, void* all, std::int64_t bytes);
  Operation all_reduce(Owner owner, float* values, std::int64_t count,
                       Transport::Reduction reduction);
  Operation reduce_scatter(Owner owner, const float* values, float* mine,
                           std::span<const std::int64_t> counts);
  Operation broadcast(Owner owner, void* data, std::int64_t bytes, int root);
  Operation send(Owner owner, const void* data, std::int64_t bytes, int to, int tag);
  Operation receive(Owner owner, void* data, std::int64_t bytes, int from, int tag);

  /// Drives on all that was begun; to be called often while this rank computes.
  void poke();
  /// Throws PeerError after the timeout.
  void wait(const Operation& operation, const std::string& what);
  void wait_all(const std::string& what);
  /// Leaves what is not done yet, whose buffers are then kept for ever; whether there was none.
  bool give_up() noexcept;

  std::int64_t messages() const { return messages_; }
  std::int64_t message_bytes() const { return message_bytes_; }
  double waiting_seconds() const { return waiting_seconds_; }

 private:
  struct UnderWay {
    Operation operation;
    Owner owner;
  };
  Operation begin(Owner owner, Transport::Pending pending, std::int64_t bytes);
  /// Ranks from which no sign of life came.
  std::vector<int> silent_ranks();

  Transport& transport_;
  double timeout_seconds_;
  std::deque<UnderWay> under_way_;
  std::int64_t messages_ = 0, message_bytes_ = 0;
  double waiting_seconds_ = 0;
};

}  // namespace keyfold::ranks

// The Channel outlives what a transport throws.
#include "ranks/channel.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

namespace keyfold::ranks {
namespace {

/// Of whatever is sent to rank n, the n-th function is done().
class Scripted : public Transport {
 public:
  using Done = std::function<bool()>;
  explicit Scripted(std::vector<Done> script) : script_(std::move(script)) {}
  int rank() const override { return 0; }
  int num_ranks() const override { return 1; }
  Pending all_gather(const void*, void*, std::int64_t) override { return {}; }
  Pending all_reduce(float*, std::int64_t, Reduction) override { return {}; }
  Pending reduce_scatter(const float*, float*, std::span<const std::int64_t>) override {
    return {};
  }
  Pending broadcast(void*, std::int64_t, int) override { return {}; }
  Pending receive(void*, std::int64_t, int, int) override { return {}; }
  Pending send(const void*, std::int64_t, int to, int) override {
    struct It : Request {
      explicit It(Done done) : done_(std::move(done)) {}
      bool done() override { return done_(); }
      Done done_;
    };
    return std::make_unique<It>(script_[static_cast<std::size_t>(to)]);
  }

 private:
  std::vector<Done> script_;
};

TEST(Channel, OutlivesARequestThatThrows) {
  Scripted transport({[] { return true; }, [] { return false; },
                      []() -> bool { throw std::runtime_error("broken"); }});
  Channel channel(transport, 1);
  for (const int to : {0, 1, 2}) channel.send(nullptr, nullptr, 0, to, 0);
  EXPECT_THROW(channel.poke(), std::runtime_error);
  EXPECT_THROW(channel.poke(), std::runtime_error);
  EXPECT_FALSE(channel.give_up());
  EXPECT_TRUE(channel.give_up()) << "what was given up is asked no more";
}

}  // namespace
}  // namespace keyfold::ranks

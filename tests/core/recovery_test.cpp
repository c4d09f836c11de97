// Devices that are lost, at every point where one can be: the result is that of a good device, or
// one clear error.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <set>

#include "core/scripted_backend.hpp"
#include "core/session.hpp"
#include "keyfold/keyfold.hpp"
#include "support/case.hpp"

namespace keyfold::test {
namespace {

constexpr double kAfterEachDispatch = std::numeric_limits<double>::min();
constexpr double kNever = 1e9;

class RecoveryTest : public testing::Test {
 protected:
  RecoveryTest() {
    options_.backend = ScriptedBackend::kName;
    options_.chunk_size = 128;
  }

  /// A good device, replaced by another when it is lost.
  void reset(double checkpoint_seconds) {
    ScriptedBackend::fresh();
    backend_.script.kernel.checkpoint_seconds = checkpoint_seconds;
    out_.poison();
  }

  Report attend() {
    AttentionOptions options = call_.options;
    options.run = options_;
    return scaled_dot_product_attention(call_.q, call_.k, call_.v, out_.mutable_view(), options);
  }

  /// Feeds the keys in pieces, each in memory that is dead after its update.
  Report stream() {
    AttentionOptions options = call_.options;
    options.run = options_;
    const std::vector<std::int64_t> lengths(2, kKeys);
    options.kv_lens = lengths;
    AttentionState state(call_.q, options);
    std::set<const void*> dead;
    backend_.script.on_source = [&](const ChunkBox&, const core::KeySource& source) {
      EXPECT_FALSE(dead.contains(source.k.data));
      EXPECT_FALSE(dead.contains(source.v.data));
    };
    std::int64_t begin = 0;
    for (const std::int64_t length : {100, 28, 1, 300, 200, 71}) {
      const TensorView k = slice(call_.k, 2, begin, begin + length);
      const TensorView v = slice(call_.v, 2, begin, begin + length);
      state.update(k, v);
      dead.insert(k.data);
      dead.insert(v.data);
      begin += length;
    }
    EXPECT_EQ(begin, kKeys);
    Report report = state.finish(out_.mutable_view());
    backend_.script.on_source = [](const ChunkBox&, const core::KeySource&) {};
    return report;
  }

  void expect_complete() const {
    out_.each([&](const Dims& i) {
      ASSERT_EQ(out_.at(i), static_cast<float>(kKeys - inputs_.c.q_len + i[2] + 1));
    });
    EXPECT_EQ(backend_.log.runs_alive, 0);
    EXPECT_EQ(backend_.log.in_flight, 0);
  }

  /// Every call of the device's functions counts one; the device is lost at those in `at`.
  void lose_at(const std::set<int>& at) {
    calls_ = 0;
    lose_when([this, at](const char*) { return at.contains(calls_++); });
  }
  template <class When>
  void lose_when(const When& when) {
    const auto act = [when](const char* place) {
      return [=] {
        if (when(place)) throw core::DeviceLost(std::string("lost in ") + place);
      };
    };
    const auto dispatch = [act](const char* place) {
      return [act = act(place)](std::int64_t) { act(); };
    };
    Script& s = backend_.script;
    s.on_begin = [begin = act("begin")](const core::Block&) { begin(); };
    s.on_submit = dispatch("submit");
    s.on_wait = dispatch("wait");
    s.on_checkpoint = act("checkpoint");
    s.on_recover = act("recover");
    s.on_finish = act("finish");
    s.on_merge = act("merge");
  }

  static constexpr std::int64_t kKeys = 700;
  ScriptedBackend& backend_ = ScriptedBackend::fresh();
  Rng rng_{"recovery"};
  Inputs inputs_{{.batch = 2,
                  .num_heads = 4,
                  .num_kv_heads = 2,
                  .q_len = 40,
                  .kv_len = kKeys,
                  .head_dim = 4,
                  .causal = true},
                 rng_};
  Call call_ = inputs_.call();
  Tensor out_{DType::kFloat32, call_.out_sizes()};
  RunOptions options_;
  int calls_ = 0;
};

TEST_F(RecoveryTest, AnywhereInACall) {
  for (const std::int64_t scratch : {1 << 20, 9000}) {  // one block, and several
    options_.max_scratch_bytes = scratch;
    for (const double interval : {kAfterEachDispatch, kNever}) {
      reset(interval);
      lose_at({});
      const Report good = attend();
      EXPECT_EQ(good.recoveries, 0);
      EXPECT_EQ(backend_.log.checkpoints > 0, interval < 1);
      const int total = calls_;
      ASSERT_GT(total, 10);
      for (int at = 0; at < total; ++at) {
        for (const bool again : {false, true}) {  // once more in what follows the first loss
          SCOPED_TRACE(std::to_string(at) + (again ? " and again" : ""));
          reset(interval);
          lose_at(again ? std::set{at, at + 1, at + 3} : std::set{at});
          const Report report = attend();
          expect_complete();
          EXPECT_GE(report.recoveries, again ? 2 : 1);
          EXPECT_LE(report.recoveries, again ? 3 : 1);
          // No more than what was not kept is run again. After a loss, chunks are smaller.
          if (interval < 1 && !again) {
            double flops = 0;
            for (const core::Chunk& chunk : backend_.log.chunks) flops += chunk.flops;
            double once = 0;
            for (std::int64_t i = 0; i < 40; ++i) once += static_cast<double>(660 + i + 1);
            once *= 2.0 * 4 * 4 * static_cast<double>(call_.shape().head_dim);
            EXPECT_LE(flops, once * 1.5);
          }
        }
      }
    }
  }
}

TEST_F(RecoveryTest, AnywhereInAStream) {
  for (const double interval : {kAfterEachDispatch, kNever}) {
    reset(interval);
    lose_at({});
    EXPECT_EQ(stream().recoveries, 0);
    expect_complete();
    EXPECT_GT(backend_.log.checkpoints, 0);
    const int total = calls_;
    for (int at = 0; at < total; ++at) {
      for (const bool again : {false, true}) {
        SCOPED_TRACE(std::to_string(at) + (again ? " and again" : ""));
        reset(interval);
        lose_at(again ? std::set{at, at + 1, at + 3} : std::set{at});
        EXPECT_GE(stream().recoveries, 1);
        expect_complete();
      }
    }
  }
}

TEST_F(RecoveryTest, AtRandom) {
  for (int round = 0; round < by_scale(20, 100, 400) && !HasFailure(); ++round) {
    SCOPED_TRACE(round);
    reset(rng_.one_in(2) ? kAfterEachDispatch : kNever);
    options_.chunk_size.reset();
    if (rng_.one_in(2)) options_.chunk_size = 64 * rng_.between(1, 4);
    options_.chunk_threshold = rng_.one_in(4) ? 10000 : 0;
    options_.max_scratch_bytes = rng_.between(2000, 40000);
    backend_.script.kernel.max_in_flight = static_cast<int>(rng_.between(1, 2));
    backend_.script.kernel.first_dispatch_flops = static_cast<double>(rng_.between(1000, 1000000));
    int losses = 0, checkpoints = 0, in_a_row = 0;
    lose_when([&](const char*) {
      // Never as often as would end the call.
      if (backend_.log.checkpoints != checkpoints) in_a_row = 0;
      checkpoints = backend_.log.checkpoints;
      if (in_a_row == core::Session::kMostLosses - 1 || !rng_.one_in(15)) return false;
      ++in_a_row;
      ++losses;
      return true;
    });
    EXPECT_EQ(attend().recoveries, losses);
    expect_complete();
  }
}

TEST_F(RecoveryTest, AlwaysEnds) {
  for (const std::string place : {"begin", "submit", "wait", "checkpoint", "recover", "finish"}) {
    SCOPED_TRACE(place);
    reset(kAfterEachDispatch);
    bool first = true;
    lose_when([&](const char* at) {
      if (place == at) return true;
      return place == "recover" && at == std::string("wait") && std::exchange(first, false);
    });
    options_.budget_ms = 80;
    try {
      attend();
      ADD_FAILURE() << "did not fail";
    } catch (const RunError& e) {
      EXPECT_EQ(e.code(), ErrorCode::kDeviceFailure);
      const std::string what = e.what();
      for (const char* part : {"lost in ", " 4 times", "row 0, key ", "budget of 10 ms",
                               "nothing was written", "Lower budget_ms"})
        EXPECT_NE(what.find(part), std::string::npos) << part << " in: " << what;
    }
    EXPECT_TRUE(out_.untouched());
    EXPECT_EQ(backend_.log.runs_alive, 0);
    EXPECT_EQ(backend_.log.in_flight, 0);
  }
}

TEST_F(RecoveryTest, GoesOnWhileCheckpointsAreMade) {
  reset(kAfterEachDispatch);
  int dispatches = 0;
  lose_when([&](const char* at) { return at == std::string("wait") && ++dispatches % 2 == 0; });
  backend_.script.kernel.max_in_flight = 1;
  backend_.script.kernel.first_dispatch_flops = 1e4;
  EXPECT_GT(attend().recoveries, 2 * core::Session::kMostLosses);
  expect_complete();
}

TEST_F(RecoveryTest, DispatchesAreHalvedWhateverTheChunkSize) {
  for (const bool whole : {false, true}) {
    for (const int losses : {1, 2, 3}) {
      reset(kNever);
      backend_.script.kernel.max_in_flight = 1;
      backend_.script.kernel.first_dispatch_flops = 1e5;
      backend_.script.seconds = [](std::int64_t, double) { return 1.0; };
      options_.chunk_size = kKeys;
      options_.chunk_threshold = whole ? kKeys + 1 : 0;
      int left = losses;
      lose_when([&](const char* at) { return at == std::string("wait") && left-- > 0; });
      EXPECT_EQ(attend().recoveries, losses);
      expect_complete();
      const auto& chunks = backend_.log.chunks;
      EXPECT_GT(chunks[0].flops, 1e5);
      for (std::size_t i = 1; i < chunks.size(); ++i) {
        const ChunkBox& box = chunks[i].box;
        const bool smallest = box.group_end - box.group_begin == 1 &&
                              box.row_end - box.row_begin <= 16 &&
                              box.key_end - box.key_begin <= 64;
        const double share = std::pow(0.5, std::min(static_cast<int>(i), losses));
        EXPECT_TRUE(smallest || chunks[i].flops <= 1e5 * share) << i;
      }
    }
  }
}

TEST_F(RecoveryTest, OnlyWhereTheBackendCan) {
  reset(0);
  lose_when([&](const char* at) { return at == std::string("wait"); });
  EXPECT_THROW(attend(), core::DeviceLost);
  EXPECT_EQ(backend_.log.recoveries, 0);
  EXPECT_TRUE(out_.untouched());
  // A failure that is no loss is not survived.
  reset(kAfterEachDispatch);
  backend_.script.on_wait = [](std::int64_t) {
    throw RunError(ErrorCode::kDeviceFailure, "a page fault");
  };
  EXPECT_THROW(attend(), RunError);
  EXPECT_EQ(backend_.log.recoveries, 0);
  // Nothing is copied for a device that cannot be lost.
  reset(0);
  stream();
  attend();
  expect_complete();
  EXPECT_EQ(backend_.log.checkpoints, 0);
}

TEST_F(RecoveryTest, InAMerge) {
  reset(kNever);
  AttentionOptions options = call_.options;
  options.run = options_;
  options.q_offset = kKeys - inputs_.c.q_len;
  options.causal = false;
  AttentionState a(call_.q, options), b(call_.q, options);
  a.update(slice(call_.k, 2, 0, 64), slice(call_.v, 2, 0, 64));
  b.update(slice(call_.k, 2, 64, 128), slice(call_.v, 2, 64, 128));
  int left = 1;
  lose_when([&](const char* at) { return at == std::string("merge") && left-- > 0; });
  const int checkpoints = backend_.log.checkpoints;
  a.merge(std::move(b));
  EXPECT_EQ(backend_.log.recoveries, 2);  // both runs
  EXPECT_EQ(backend_.log.checkpoints, checkpoints + 1);
}

TEST_F(RecoveryTest, ProgressGoesBackAndEndsAtOne) {
  reset(kNever);
  std::vector<Progress> all;
  options_.progress = [&](const Progress& p) { all.push_back(p); };
  int waits = 0;
  lose_when([&](const char* at) { return at == std::string("wait") && ++waits == 4; });
  const Report report = attend();
  ASSERT_EQ(report.dispatches, static_cast<std::int64_t>(all.size()));
  EXPECT_LT(all[3].fraction, all[2].fraction);
  EXPECT_NEAR(all.back().fraction, 1, 1e-9);
  EXPECT_EQ(all.back().next_key, kKeys);
}

}  // namespace
}  // namespace keyfold::test

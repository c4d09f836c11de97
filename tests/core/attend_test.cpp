// The loop that runs chunks, on the scripted backend: order, flight, budget, progress, cancelling
// and failing at every chunk.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <thread>

#include "core/scripted_backend.hpp"
#include "keyfold/keyfold.hpp"
#include "support/case.hpp"

namespace keyfold::test {
namespace {

class AttendTest : public testing::Test {
 protected:
  static Case small_case() {
    return {.batch = 2,
            .num_heads = 4,
            .num_kv_heads = 2,
            .q_len = 40,
            .kv_len = 700,
            .head_dim = 4,
            .causal = true};
  }

  explicit AttendTest(const Case& c = small_case())
      : rng_("attend"),
        inputs_(c, rng_),
        call_(inputs_.call()),
        out_(DType::kFloat32, call_.out_sizes()),
        lse_(DType::kFloat32, {c.batch, c.num_heads, c.q_len, 1}) {
    options_.backend = ScriptedBackend::kName;
    out_.poison();
    lse_.poison();
  }

  Report attend() {
    AttentionOptions options = call_.options;
    options.run = options_;
    options.lse = lse_.mutable_view();
    return scaled_dot_product_attention(call_.q, call_.k, call_.v, out_.mutable_view(), options);
  }

  /// out holds the number of visible keys of each row.
  void expect_complete() const {
    out_.each([&](const Dims& i) {
      const auto seen = static_cast<float>(inputs_.c.kv_len - inputs_.c.q_len + i[2] + 1);
      ASSERT_EQ(out_.at(i), seen);
    });
    EXPECT_TRUE(out_.only_elements_written());
  }

  void expect_nothing_happened() const {
    EXPECT_TRUE(out_.untouched());
    EXPECT_TRUE(lse_.untouched());
    EXPECT_EQ(backend_.log.runs_alive, 0);
    EXPECT_EQ(backend_.log.in_flight, 0);
  }

  ScriptedBackend& backend_ = ScriptedBackend::fresh();
  Rng rng_;
  Inputs inputs_;
  Call call_;
  Tensor out_, lse_;
  RunOptions options_;
};

TEST_F(AttendTest, AtMostTwoDispatchesInFlight) {
  for (const int most : {1, 2}) {
    ScriptedBackend::fresh().script.kernel.max_in_flight = most;
    options_.chunk_size = 64;
    const Report report = attend();
    EXPECT_EQ(backend_.log.most_in_flight, most);
    EXPECT_EQ(backend_.log.most_runs_alive, 1);
    EXPECT_EQ(report.dispatches, static_cast<std::int64_t>(backend_.log.chunks.size()));
    EXPECT_EQ(report.dispatches, backend_.log.waited);
    EXPECT_GE(report.dispatches, 11);
    expect_complete();
  }
}

TEST_F(AttendTest, DispatchesStayWithinTheBudgetAtAnySpeed) {
  const std::function<double(std::int64_t)> speeds[] = {
      [](std::int64_t) { return 1e8; },
      [](std::int64_t i) { return 1e8 * std::pow(0.99, static_cast<double>(i)); },
      [](std::int64_t i) { return i % 9 == 8 ? 5.5e7 : 1e8; },
  };
  for (const auto& speed : speeds) {
    ScriptedBackend::fresh();
    backend_.script.kernel.first_dispatch_flops = 2e4;
    backend_.script.kernel.split_len = 16;
    backend_.script.seconds = [&](std::int64_t i, double flops) { return flops / speed(i); };
    options_.budget_ms = 1;
    const Report report = attend();
    EXPECT_GT(report.dispatches, 20);
    EXPECT_LE(report.longest_dispatch_ms, 1.5);
    EXPECT_EQ(report.longest_dispatch_ms,
              1e3 * *std::max_element(backend_.log.seconds.begin(), backend_.log.seconds.end()));
    expect_complete();
  }
}

TEST_F(AttendTest, RunsAsPlannedWhereTheSpeedIsAsEstimated) {
  backend_.script.kernel.max_in_flight = 1;
  backend_.script.kernel.first_dispatch_flops = 1e4;
  for (const std::int64_t scratch : {1 << 20, 9000}) {
    backend_.log = {};
    options_.budget_ms = 1;
    options_.max_scratch_bytes = scratch;
    AttentionOptions options = call_.options;
    options.run = options_;
    options.lse = lse_.mutable_view();
    const Plan plan = keyfold::plan(call_.shape(), options);
    const Report report = attend();
    ASSERT_EQ(plan.chunks.size(), backend_.log.chunks.size());
    for (std::size_t i = 0; i < plan.chunks.size(); ++i) {
      const ChunkBox &a = plan.chunks[i], &b = backend_.log.chunks[i].box;
      EXPECT_TRUE(a.group_begin == b.group_begin && a.group_end == b.group_end &&
                  a.row_begin == b.row_begin && a.row_end == b.row_end &&
                  a.key_begin == b.key_begin && a.key_end == b.key_end);
      EXPECT_LE(a.key_end - a.key_begin, plan.keys_per_chunk);
      EXPECT_LE(a.row_end - a.row_begin, plan.rows_per_chunk);
    }
    EXPECT_EQ(plan.num_row_blocks, backend_.log.runs_begun);
    EXPECT_EQ(plan.scratch_bytes, report.scratch_bytes);
    EXPECT_LE(plan.scratch_bytes, scratch);
    EXPECT_EQ(plan.staging_bytes, report.staging_bytes);
    EXPECT_EQ(plan.staging_bytes > 0, plan.num_row_blocks > 1);
    EXPECT_EQ(plan.backend, report.backend);
    EXPECT_EQ(plan.kernel, report.kernel);
  }
}

TEST_F(AttendTest, ChunkSizeAndThreshold) {
  options_.chunk_size = 65;  // two splits of 64
  attend();
  for (const core::Chunk& chunk : backend_.log.chunks)
    EXPECT_LE(chunk.box.key_end - chunk.box.key_begin, 128);
  backend_.log = {};
  options_.chunk_threshold = inputs_.c.kv_len;
  EXPECT_GT(attend().dispatches, 1);
  options_.chunk_threshold = inputs_.c.kv_len + 1;
  EXPECT_EQ(attend().dispatches, 1);
  expect_complete();
}

TEST_F(AttendTest, ChunksKeepToTheKeysThatTheBackendHasRoomFor) {
  backend_.script.max_chunk_keys = 192;
  for (const std::int64_t chunk_size : {0, 64, 640}) {
    for (const std::int64_t threshold : {0, 10000}) {
      backend_.log = {};
      options_.chunk_size.reset();
      if (chunk_size > 0) options_.chunk_size = chunk_size;
      options_.chunk_threshold = threshold;
      attend();
      expect_complete();
      AttentionOptions options = call_.options;
      options.run = options_;
      const Plan plan = keyfold::plan(call_.shape(), options);
      std::int64_t most = 0;
      for (const core::Chunk& chunk : backend_.log.chunks)
        most = std::max(most, chunk.box.key_end - chunk.box.key_begin);
      EXPECT_EQ(most, chunk_size == 64 && threshold == 0 ? 64 : 192);
      EXPECT_EQ(plan.keys_per_chunk, most);
      if (threshold > 0) {
        EXPECT_EQ(backend_.log.chunks.size(), 4u);
        EXPECT_EQ(plan.chunks.size(), 4u);
      }
    }
  }
}

TEST_F(AttendTest, ProgressRisesToOne) {
  for (const std::int64_t scratch : {1 << 20, 9000}) {
    options_.chunk_size = 64;
    options_.max_scratch_bytes = scratch;
    std::vector<Progress> all;
    const auto caller = std::this_thread::get_id();
    options_.progress = [&](const Progress& p) {
      EXPECT_EQ(std::this_thread::get_id(), caller);
      all.push_back(p);
    };
    const Report report = attend();
    ASSERT_EQ(static_cast<std::int64_t>(all.size()), report.dispatches);
    for (std::size_t i = 0; i < all.size(); ++i) {
      EXPECT_EQ(all[i].dispatches, static_cast<std::int64_t>(i) + 1);
      if (i == 0) continue;
      EXPECT_GT(all[i].fraction, all[i - 1].fraction);
      EXPECT_GE(all[i].elapsed_ms, all[i - 1].elapsed_ms);
      EXPECT_GE(all[i].longest_dispatch_ms, all[i].last_dispatch_ms);
      EXPECT_GE(all[i].next_row, all[i - 1].next_row);
      if (scratch > 9000) {
        EXPECT_GE(all[i].next_key, all[i - 1].next_key);
      }
    }
    EXPECT_NEAR(all.back().fraction, 1, 1e-9);
    EXPECT_EQ(all.back().next_key, inputs_.c.kv_len);
  }
}

TEST_F(AttendTest, CancelledAtEveryChunk) {
  for (const std::int64_t scratch : {1 << 20, 9000}) {  // one block, and several
    options_.chunk_size = 64;
    options_.max_scratch_bytes = scratch;
    options_.stop_token = {};
    options_.progress = {};
    const std::int64_t total = attend().dispatches;
    for (std::int64_t stop_at = 0; stop_at <= total; ++stop_at) {
      SCOPED_TRACE(stop_at);
      backend_.log = {};
      out_.poison();
      lse_.poison();
      std::stop_source stop;
      options_.stop_token = stop.get_token();
      if (stop_at == 0) stop.request_stop();
      Progress last;
      options_.progress = [&](const Progress& p) {
        last = p;
        if (p.dispatches == stop_at) stop.request_stop();
      };
      try {
        attend();
        ADD_FAILURE() << "was not cancelled";
      } catch (const Cancelled& e) {
        EXPECT_EQ(e.code(), ErrorCode::kCancelled);
        EXPECT_EQ(e.where().dispatches, stop_at);
        EXPECT_EQ(e.where().next_key, last.next_key);
        EXPECT_EQ(e.where().fraction, last.fraction);
        EXPECT_NE(std::string(e.std::runtime_error::what()).find(std::to_string(stop_at)),
                  std::string::npos);
      }
      expect_nothing_happened();
      EXPECT_LE(static_cast<std::int64_t>(backend_.log.chunks.size()), stop_at + 1);
    }
  }
}

TEST_F(AttendTest, FailsAtEveryChunk) {
  const auto fail_at = [](std::int64_t at) {
    return [at](std::int64_t index) {
      if (index == at) throw RunError(ErrorCode::kDeviceFailure, "the device was lost");
    };
  };
  options_.chunk_size = 64;
  for (const std::int64_t scratch : {1 << 20, 9000}) {
    options_.max_scratch_bytes = scratch;
    const std::int64_t total = attend().dispatches;
    for (std::int64_t at = 0; at < total; ++at) {
      for (const bool in_wait : {false, true}) {
        SCOPED_TRACE(std::to_string(at) + (in_wait ? " in wait" : " in submit"));
        ScriptedBackend::fresh();
        (in_wait ? backend_.script.on_wait : backend_.script.on_submit) = fail_at(at);
        out_.poison();
        lse_.poison();
        try {
          attend();
          ADD_FAILURE() << "did not fail";
        } catch (const RunError& e) {
          EXPECT_EQ(e.code(), ErrorCode::kDeviceFailure);
          EXPECT_STREQ(e.std::runtime_error::what(), "the device was lost");
        }
        expect_nothing_happened();
      }
    }
    ScriptedBackend::fresh();
  }
}

TEST_F(AttendTest, AThrowingCallbackPassesThrough) {
  struct Mine {};
  options_.chunk_size = 64;
  options_.progress = [](const Progress& p) {
    if (p.dispatches == 3) throw Mine();
  };
  EXPECT_THROW(attend(), Mine);
  expect_nothing_happened();
}

TEST_F(AttendTest, MemoryThatRunsOutIsAnErrorOfItsOwn) {
  backend_.script.on_submit = [](std::int64_t) { throw std::bad_alloc(); };
  try {
    attend();
    ADD_FAILURE() << "did not fail";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kOutOfMemory);
  }
  expect_nothing_happened();
}

TEST_F(AttendTest, BlocksAreSmallerWhereMemoryIsShort) {
  const std::int64_t all = std::int64_t{4} * 40 * 2 * 64;  // scratch of all rows
  for (const bool bad_alloc : {false, true}) {
    for (const std::int64_t room : {all, all - 1, all / 2, all / 3, all / 7, all / 40}) {
      for (const std::int64_t limit : {all * 100, all / 2}) {
        // The memory is short from the first block on, or from the third.
        for (const int from : {0, 2}) {
          SCOPED_TRACE(room);
          ScriptedBackend::fresh();
          options_.max_scratch_bytes = limit;
          int begun = 0;
          backend_.script.on_begin = [&](const core::Block& b) {
            const std::int64_t bytes =
                (b.group_end - b.group_begin) * (b.row_end - b.row_begin) * 2 * 64;
            if (bytes <= room || begun++ < from) return;
            if (bad_alloc) throw std::bad_alloc();
            throw RunError(ErrorCode::kOutOfMemory, "the device is full");
          };
          Progress last;
          options_.progress = [&](const Progress& p) { last = p; };
          out_.poison();
          const Report report = attend();
          expect_complete();
          EXPECT_NEAR(last.fraction, 1, 1e-9);
          EXPECT_EQ(report.staging_bytes > 0, report.scratch_bytes < all);
          if (from == 0) {
            EXPECT_LE(report.scratch_bytes, room);
            EXPECT_GE(report.scratch_bytes, std::min(room, limit) / 3);
          }
        }
      }
    }
  }
}

TEST_F(AttendTest, WithoutMemoryForOneRowTheErrorSaysWhatWasTried) {
  backend_.script.on_begin = [](const core::Block&) {
    throw RunError(ErrorCode::kOutOfMemory, "the device is full");
  };
  try {
    attend();
    ADD_FAILURE() << "did not fail";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kOutOfMemory);
    const std::string what = e.what();
    for (const char* part : {"tried 20480, 10240, 5120, ", " 128 bytes", "the device is full"})
      EXPECT_NE(what.find(part), std::string::npos) << what;
  }
  expect_nothing_happened();
  // The state of a stream cannot be cut into blocks.
  AttentionOptions options;
  options.run = options_;
  AttentionState state(call_.q, options);
  EXPECT_THROW(state.update(call_.k, call_.v), RunError);
  backend_.script.on_begin = [](const core::Block&) {};
  state.update(call_.k, call_.v);  // nothing had been begun
}

TEST_F(AttendTest, EveryErrorIsAnErrorAndAStdException) {
  const auto code = [&] {
    try {
      attend();
    } catch (const Error& e) {
      EXPECT_STRNE(e.what(), "");
      return e.code();
    }
    return ErrorCode::kInternal;
  };
  options_.budget_ms = 0;
  EXPECT_EQ(code(), ErrorCode::kInvalidArgument);
  EXPECT_THROW(attend(), std::exception);
  options_.budget_ms.reset();
  std::stop_source stop;
  stop.request_stop();
  options_.stop_token = stop.get_token();
  EXPECT_EQ(code(), ErrorCode::kCancelled);
  EXPECT_THROW(attend(), std::exception);
}

TEST_F(AttendTest, RandomShapesGiveEachRowItsKeys) {
  Rng rng("attend random");
  for (int round = 0; round < by_scale(20, 60, 300) && !HasFailure(); ++round) {
    Case c{.batch = rng.between(1, 3),
           .num_heads = 4,
           .num_kv_heads = rng.pick<std::int64_t>({1, 2, 4}),
           .q_len = rng.between(1, 60),
           .kv_len = rng.between(0, 900),
           .head_dim = 2};
    c.causal = rng.one_in(2);
    if (rng.one_in(2)) c.window.left = rng.between(0, c.kv_len);
    if (rng.one_in(2))
      for (std::int64_t b = 0; b < c.batch; ++b) c.kv_lens.push_back(rng.between(0, c.kv_len));
    const Inputs inputs(c, rng);
    const Call call = inputs.call();
    ScriptedBackend::fresh();
    backend_.script.kernel.max_in_flight = static_cast<int>(rng.between(1, 2));
    backend_.script.seconds = [&](std::int64_t, double) { return 1e-4 * rng.uniform(); };
    AttentionOptions options = call.options;
    options.run.backend = ScriptedBackend::kName;
    options.run.budget_ms = 0.1;
    options.run.max_scratch_bytes = rng.between(256, 20000);
    Tensor out(c.dtype, call.out_sizes(), Layout::kTransposed);
    out.poison();
    // The run's own checks do the judging.
    scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), options);
    EXPECT_TRUE(out.only_elements_written());
    out.each([&](const Dims& i) { ASSERT_FALSE(out.poisoned(i)); });
  }
}

TEST_F(AttendTest, AStateThatWasCancelledOrFailedSaysSo) {
  for (const bool cancel : {false, true}) {
    ScriptedBackend::fresh();
    std::stop_source stop;
    AttentionOptions options;
    options.run = options_;
    options.run.stop_token = stop.get_token();
    AttentionState state(call_.q, options);
    state.update(call_.k, call_.v);
    if (cancel) {
      stop.request_stop();
      EXPECT_THROW(state.update(call_.k, call_.v), Cancelled);
    } else {
      backend_.script.on_submit = [](std::int64_t) {
        throw RunError(ErrorCode::kDeviceFailure, "lost");
      };
      EXPECT_THROW(state.update(call_.k, call_.v), RunError);
    }
    EXPECT_THROW(state.update(call_.k, call_.v), InvalidArgument);
    EXPECT_THROW(state.finish(out_.mutable_view()), InvalidArgument);
    EXPECT_TRUE(out_.untouched());
  }
  EXPECT_EQ(backend_.log.runs_alive, 0);
}

}  // namespace
}  // namespace keyfold::test

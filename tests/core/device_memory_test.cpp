// Keys on a device: which address is where, what is refused, and that every key arrives.
#include "keyfold/device_memory.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <numeric>

#include "core/device_memory.hpp"
#include "core/half.hpp"
#include "core/registry.hpp"
#include "core/scripted_backend.hpp"
#include "keyfold/keyfold.hpp"
#include "support/case.hpp"
#include "support/environment.hpp"

namespace keyfold::test {
namespace {

constexpr const char* kScripted = ScriptedBackend::kName;

/// Of another name, for buffers on two devices.
class OtherBackend : public ScriptedBackend {
 public:
  DeviceInfo device() const override {
    DeviceInfo info = ScriptedBackend::device();
    info.backend = "other";
    return info;
  }
};

std::int64_t bytes_of(const TensorView& t) {
  std::int64_t last = 0;
  for (std::size_t i = 0; i < 4; ++i) last += (t.sizes[i] - 1) * t.strides[i];
  return (last + 1) * size_of(t.dtype);
}

/// A tensor in a buffer of its own, behind 192 bytes of something else.
struct OnDevice {
  explicit OnDevice(const TensorView& t, const char* backend = kScripted)
      : buffer(backend, kOffset + bytes_of(t)), view(t) {
    buffer.upload(kOffset, t.data, bytes_of(t));
    view.data = static_cast<std::byte*>(buffer.data()) + kOffset;
  }
  static constexpr std::int64_t kOffset = 192;
  DeviceBuffer buffer;
  TensorView view;
};

class DeviceMemoryTest : public testing::Test {
 protected:
  explicit DeviceMemoryTest(Layout layout = Layout::kDense) { make(layout); }

  void make(Layout layout) {
    inputs_.emplace(Case{.dtype = DType::kFloat16,
                         .batch = 2,
                         .num_heads = 4,
                         .num_kv_heads = 2,
                         .q_len = 20,
                         .kv_len = kKeys,
                         .head_dim = 4,
                         .value_dim = 6,
                         .layout = layout},
                    rng_);
    call_ = inputs_->call();
    options_ = call_.options;
    out_ = Tensor(DType::kFloat16, call_.out_sizes());
    out_.poison();
    ScriptedBackend::fresh();
    backend_.script.on_source = [this](const ChunkBox& box, const core::KeySource& source) {
      on_device_ += source.on_device();
      on_host_ += !source.on_device();
      expect_keys(box, source, source.k, source.k_device, call_.k);
      expect_keys(box, source, source.v, source.v_device, call_.v);
    };
  }

  /// The chunk's keys are those of the call.
  static void expect_keys(const ChunkBox& box, const core::KeySource& source, const TensorView& got,
                          const core::DevicePlace& place, const TensorView& expected) {
    ASSERT_EQ(source.on_device(), place.memory != nullptr);
    for (std::int64_t b = 0; b < got.sizes[0]; ++b)
      for (std::int64_t h = 0; h < got.sizes[1]; ++h)
        for (std::int64_t j = box.key_begin; j < box.key_end; ++j)
          for (std::int64_t d = 0; d < got.sizes[3]; ++d) {
            const std::byte* at = core::element(got, b, h, j - source.first_key, d);
            std::uint16_t bits = 0, wanted = 0;
            if (place.memory) {
              place.memory->download(place.offset + (at - static_cast<const std::byte*>(got.data)),
                                     &bits, 2);
            } else {
              std::memcpy(&bits, at, 2);
            }
            std::memcpy(&wanted, core::element(expected, b, h, j, d), 2);
            ASSERT_EQ(bits, wanted) << "key " << j;
          }
  }

  Report attend(const TensorView& k, const TensorView& v) {
    return scaled_dot_product_attention(call_.q, k, v, out_.mutable_view(), options_);
  }

  void expect_complete() const {
    out_.each([&](const Dims& i) { ASSERT_EQ(out_.at(i), static_cast<float>(kKeys)); });
  }

  /// Runs `act`, which must fail with InvalidArgument about `argument`.
  template <class Act>
  void expect_refused(const char* argument, const char* part, const Act& act) {
    SCOPED_TRACE(argument);
    try {
      act();
      ADD_FAILURE() << "was not refused";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(e.argument(), argument);
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
    EXPECT_TRUE(out_.untouched());
  }

  static constexpr std::int64_t kKeys = 700;
  ScriptedBackend& backend_ = ScriptedBackend::fresh();
  Rng rng_{"device memory"};
  std::optional<Inputs> inputs_;
  Call call_;
  AttentionOptions options_;
  Tensor out_;
  int on_device_ = 0, on_host_ = 0;
};

TEST_F(DeviceMemoryTest, ABufferIsARangeOfAddresses) {
  DeviceBuffer a(kScripted, 10), b(kScripted, 100000);
  for (const DeviceBuffer* buffer : {&a, &b}) {
    const auto* begin = static_cast<const std::byte*>(buffer->data());
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(begin) % 4096, 0u);
    for (const std::int64_t offset : {std::int64_t{0}, std::int64_t{7}, buffer->size()}) {
      const auto at = core::find_device_address(begin + offset);
      ASSERT_TRUE(at);
      EXPECT_EQ(at->backend, kScripted);
      EXPECT_EQ(at->offset, offset);
      EXPECT_EQ(at->size, buffer->size());
    }
    EXPECT_FALSE(core::find_device_address(begin + buffer->size() + 1));
    EXPECT_FALSE(core::find_device_address(begin - 1));
  }
  EXPECT_FALSE(core::find_device_address(nullptr));
  EXPECT_FALSE(core::find_device_address(&a));

  std::vector<int> sent(1000), got(1000);
  std::iota(sent.begin(), sent.end(), 1);
  b.upload(96000, sent.data(), 4000);
  b.download(96000, got.data(), 4000);
  EXPECT_EQ(sent, got);
  b.upload(100000, sent.data(), 0);
  b.upload(0, nullptr, 0);
  expect_refused("offset", "0 to 10, got -1", [&] { a.upload(-1, sent.data(), 1); });
  expect_refused("offset", "0 to 10, got 11", [&] { a.download(11, got.data(), 0); });
  expect_refused("bytes", "0 to 3 from byte 7", [&] { a.upload(7, sent.data(), 4); });
  expect_refused("bytes", "got -1", [&] { a.download(0, got.data(), -1); });
  expect_refused("from", "a null pointer", [&] { a.upload(0, nullptr, 1); });
  expect_refused("to", "a null pointer", [&] { a.download(0, nullptr, 1); });
  expect_refused("from", "device buffer", [&] { a.upload(0, b.data(), 1); });

  const void* address = b.data();
  a = std::move(b);
  EXPECT_EQ(a.data(), address);
  EXPECT_EQ(a.size(), 100000);
  // NOLINTBEGIN(bugprone-use-after-move): what is left is tested
  EXPECT_EQ(b.data(), nullptr);
  EXPECT_EQ(b.size(), 0);
  expect_refused("buffer", "moved from", [&] { b.upload(0, sent.data(), 1); });
  // NOLINTEND(bugprone-use-after-move)
  { const DeviceBuffer last = std::move(a); }
  EXPECT_FALSE(core::find_device_address(address));
}

TEST_F(DeviceMemoryTest, TheHostCannotTouchIt) {
  const DeviceBuffer buffer(kScripted, 10);
  EXPECT_DEATH(*static_cast<volatile char*>(buffer.data()) = 1, "");
}

TEST_F(DeviceMemoryTest, ABufferThatCannotBeMadeSaysWhy) {
  expect_refused("bytes", "at least 1, got 0", [] { DeviceBuffer(kScripted, 0); });
  expect_refused("backend", "expected one of cpu", [] { DeviceBuffer("abacus", 1); });
  const auto failure = [](const char* backend, std::int64_t bytes) {
    try {
      DeviceBuffer(backend, bytes);
    } catch (const RunError& e) {
      EXPECT_NE(std::string(e.what()).find("memory"), std::string::npos);
      return e.code();
    }
    return ErrorCode::kInternal;
  };
  EXPECT_EQ(failure("cpu", 1), ErrorCode::kUnsupported);
  backend_.script.on_allocate = [](std::int64_t) { throw std::bad_alloc(); };
  EXPECT_EQ(failure(kScripted, 1), ErrorCode::kOutOfMemory);
  backend_.script.on_allocate = [](std::int64_t bytes) {
    if (bytes == 1) throw RunError(ErrorCode::kOutOfMemory, "no memory on the device");
  };
  EXPECT_EQ(failure(kScripted, 1), ErrorCode::kOutOfMemory);
}

TEST_F(DeviceMemoryTest, ACallRunsWhereItsKeysAre) {
  for (const Layout layout :
       {Layout::kDense, Layout::kTransposed, Layout::kSliced, Layout::kStridedDim}) {
    make(layout);
    const OnDevice k(call_.k), v(call_.v);
    on_device_ = 0;
    EXPECT_EQ(attend(k.view, v.view).backend, kScripted);
    EXPECT_GT(on_device_, 0);
    EXPECT_EQ(on_host_, 0);
    expect_complete();
  }
  const OnDevice k(call_.k), v(call_.v);
  for (const bool by_name : {true, false}) {
    out_.poison();
    const ScopedEnv env("KEYFOLD_BACKEND", by_name ? nullptr : "cpu");
    options_.run.backend.reset();
    if (by_name) options_.run.backend = "cpu";
    expect_refused("k", "'cpu', where this runs, got one on backend 'scripted'",
                   [&] { attend(k.view, v.view); });
  }
  options_.run.backend = kScripted;
  attend(k.view, v.view);
  expect_complete();
}

TEST_F(DeviceMemoryTest, KeysOnTheDeviceNeedNoRoomForCopies) {
  backend_.script.max_chunk_keys = 64;
  options_.run.backend = kScripted;
  options_.run.chunk_threshold = kKeys + 1;
  const OnDevice k(call_.k), v(call_.v);
  EXPECT_EQ(attend(k.view, v.view).dispatches, 1);
  EXPECT_EQ(attend(call_.k, call_.v).dispatches, 11);
}

TEST_F(DeviceMemoryTest, WhatIsRefused) {
  core::register_backend(std::make_shared<OtherBackend>());
  const OnDevice k(call_.k), v(call_.v), other(call_.v, "other");
  expect_refused("v", "memory on backend 'scripted', where k is, got host memory",
                 [&] { attend(k.view, call_.v); });
  expect_refused("v", "host memory, where k is, got memory on backend 'scripted'",
                 [&] { attend(call_.k, v.view); });
  expect_refused("v", "got memory on backend 'other'", [&] { attend(k.view, other.view); });
  const auto shifted = [](const OnDevice& from, std::int64_t bytes) {
    TensorView view = from.view;
    view.data = static_cast<const std::byte*>(view.data) + bytes;
    return view;
  };
  expect_refused("k", "inside its device buffer", [&] { attend(shifted(k, 2), v.view); });
  expect_refused("v", "inside its device buffer", [&] { attend(k.view, shifted(v, 2)); });
  expect_refused("k", "aligned", [&] { attend(shifted(k, -1), v.view); });
  TensorView vast = k.view;
  vast.strides[0] = std::numeric_limits<std::int64_t>::max() / 8;
  expect_refused("k", "inside its device buffer", [&] { attend(vast, v.view); });

  // All the rest must be in host memory, and is not looked at.
  DeviceBuffer buffer(kScripted, 1 << 20);
  void* data = buffer.data();
  const char* part = "only k and v can be in device memory";
  const TensorView q(data, DType::kFloat16, call_.q.sizes);
  const MutableTensorView out(data, DType::kFloat16, call_.out_sizes());
  const MutableTensorView lse(data, DType::kFloat32, {2, 4, 20, 1});
  expect_refused("q", part, [&] {
    scaled_dot_product_attention(q, call_.k, call_.v, out_.mutable_view(), options_);
  });
  expect_refused("q", part, [&] { AttentionState(q, options_); });
  expect_refused("out", part,
                 [&] { scaled_dot_product_attention(call_.q, call_.k, call_.v, out, options_); });
  const auto with = [&](const auto& change) {
    AttentionOptions options = call_.options;
    change(options);
    return options;
  };
  const std::span<const std::int64_t> lengths(static_cast<const std::int64_t*>(data), 2);
  const std::pair<const char*, AttentionOptions> wrong[] = {
      {"mask", with([&](AttentionOptions& o) {
         o.mask = TensorView(data, DType::kBool, {1, 1, 1, kKeys});
       })},
      {"sinks", with([&](AttentionOptions& o) {
         o.sinks = TensorView(data, DType::kFloat32, {1, 4, 1, 1});
       })},
      {"kv_lens", with([&](AttentionOptions& o) { o.kv_lens = lengths; })},
      {"lse", with([&](AttentionOptions& o) { o.lse = lse; })},
  };
  for (const auto& [argument, options] : wrong) {
    expect_refused(argument, part, [&, &set = options] {
      scaled_dot_product_attention(call_.q, call_.k, call_.v, out_.mutable_view(), set);
    });
    if (argument == std::string("lse")) continue;
    expect_refused(argument, part, [&, &set = options] { AttentionState(call_.q, set); });
  }
  expect_refused("kv_lens", part, [&] { plan(call_.shape(), wrong[2].second); });
  AttentionState state(call_.q, options_);
  state.update(call_.k, call_.v);
  expect_refused("out", part, [&] { state.finish(out); });
  Tensor host_lse(DType::kFloat32, lse.sizes);
  expect_refused("lse", part, [&] { state.finish(out_.mutable_view(), lse); });
  const MutableTensorView host = out_.mutable_view(), lse_a = host_lse.mutable_view();
  expect_refused("out_a", part, [&] { merge_state(out, lse_a, host, lse_a); });
  expect_refused("out_b", part, [&] { merge_state(host, lse_a, out, lse_a); });
  expect_refused("lse_a", part, [&] { merge_state(host, lse, host, lse_a); });
  expect_refused("lse_b", part, [&] { merge_state(host, lse_a, host, lse); });
}

TEST_F(DeviceMemoryTest, AStreamTakesPiecesFromTheDevice) {
  for (const Layout layout :
       {Layout::kDense, Layout::kTransposed, Layout::kSliced, Layout::kStridedDim}) {
    for (const bool mixed : {false, true}) {
      make(layout);
      const std::vector<std::int64_t> lengths(2, kKeys);
      options_.kv_lens = lengths;
      const OnDevice k(call_.k), v(call_.v);
      AttentionState state(call_.q, options_);
      std::int64_t begin = 0;
      for (const std::int64_t length : {0, 100, 28, 1, 300, 200, 71}) {
        const bool host = mixed && begin > 0 && rng_.one_in(2);
        state.update(slice(host ? call_.k : k.view, 2, begin, begin + length),
                     slice(host ? call_.v : v.view, 2, begin, begin + length));
        begin += length;
      }
      ASSERT_EQ(begin, kKeys);
      EXPECT_EQ(state.finish(out_.mutable_view()).backend, kScripted);
      expect_complete();
      EXPECT_GT(on_host_, 0);  // the tail
    }
  }
}

TEST_F(DeviceMemoryTest, ATailReadsNoKeyBehindItsEnd) {
  const std::vector<std::int64_t> lengths = {30, kKeys};
  options_.kv_lens = lengths;
  options_.run.backend = kScripted;
  const OnDevice k(call_.k), v(call_.v);
  backend_.script.on_source = [](const ChunkBox&, const core::KeySource&) {};
  AttentionState state(call_.q, options_);
  for (std::int64_t begin = 0; begin < kKeys; begin += 50)
    state.update(slice(k.view, 2, begin, begin + 50), slice(v.view, 2, begin, begin + 50));
  state.finish(out_.mutable_view());
  out_.each([&](const Dims& i) { ASSERT_EQ(out_.at(i), i[0] == 0 ? 30 : kKeys); });
}

TEST_F(DeviceMemoryTest, AStreamStaysWhereItBegan) {
  const OnDevice k(call_.k), v(call_.v);
  options_.run.backend = "cpu";
  AttentionState state(call_.q, options_);
  expect_refused("k", "'cpu', where this runs", [&] { state.update(k.view, v.view); });
  state.update(call_.k, call_.v);
  expect_refused("k", "'cpu', where this runs", [&] { state.update(k.view, v.view); });
  EXPECT_EQ(state.next_key(), kKeys);
  EXPECT_EQ(state.finish(out_.mutable_view()).backend, "cpu");

  // first_key must suit the backend that the keys then choose: the CPU's split_len is 512.
  out_.poison();
  options_.run.backend.reset();
  backend_.script.kernel.split_len = 1024;
  AttentionState later(call_.q, options_, 512);
  expect_refused("first_key", "a multiple of split_len = 1024",
                 [&] { later.update(k.view, v.view); });
}

TEST_F(DeviceMemoryTest, ALostDeviceTakesTheKeysAlong) {
  backend_.script.kernel.checkpoint_seconds = std::numeric_limits<double>::min();
  options_.run.chunk_size = 64;
  const OnDevice k(call_.k), v(call_.v);
  const auto lose_once = [&] {
    backend_.script.on_wait = [left = 1](std::int64_t) mutable {
      if (left-- > 0) throw core::DeviceLost("lost");
    };
  };
  lose_once();
  try {
    attend(k.view, v.view);
    ADD_FAILURE() << "did not fail";
  } catch (const RunError& e) {
    EXPECT_EQ(e.code(), ErrorCode::kDeviceFailure);
    EXPECT_NE(std::string(e.what()).find("device buffers are gone"), std::string::npos);
  }
  EXPECT_TRUE(out_.untouched());
  EXPECT_EQ(backend_.log.recoveries, 0);
  // What a stream has folded is kept: the device may be lost once its keys are not needed.
  const std::vector<std::int64_t> lengths(2, kKeys);
  options_.kv_lens = lengths;
  backend_.script.on_wait = [](std::int64_t) {};
  AttentionState state(call_.q, options_);
  state.update(slice(k.view, 2, 0, 320), slice(v.view, 2, 0, 320));
  lose_once();
  state.update(slice(call_.k, 2, 320, kKeys), slice(call_.v, 2, 320, kKeys));
  EXPECT_EQ(state.finish(out_.mutable_view()).recoveries, 1);
  expect_complete();
}

}  // namespace
}  // namespace keyfold::test

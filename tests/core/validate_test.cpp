// Wrong arguments of the public calls: each an InvalidArgument that names the argument, with out
// untouched.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "core/scripted_backend.hpp"
#include "keyfold/keyfold.hpp"
#include "support/case.hpp"

namespace keyfold::test {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

/// A good call with every argument there is, for the tests to spoil.
struct Arguments {
  Arguments() : inputs(good(), rng), call(inputs.call()) {
    out_memory.poison();
    lse_memory.poison();
    out = out_memory.mutable_view();
    options = call.options;
    options.kv_lens = kv_lens;
    options.lse = lse_memory.mutable_view();
    options.run.backend = ScriptedBackend::kName;
    q = call.q, k = call.k, v = call.v;
  }
  static Case good() {
    return {.batch = 2,
            .num_heads = 4,
            .num_kv_heads = 2,
            .q_len = 3,
            .kv_len = 10,
            .head_dim = 8,
            .value_dim = 6,
            .mask = Mask::kAdditive,
            .sinks = true};
  }

  Rng rng{"validate"};
  Inputs inputs;
  Call call;
  std::vector<std::int64_t> kv_lens{10, 4};
  Tensor out_memory{DType::kFloat32, {2, 4, 3, 6}}, lse_memory{DType::kFloat32, {2, 4, 3, 1}};
  TensorView q, k, v;
  MutableTensorView out;
  AttentionOptions options;
};

struct Spoiled {
  const char* what;
  const char* argument;
  void (*spoil)(Arguments&);
};

void misalign(const void*& data) { data = static_cast<const std::byte*>(data) + 1; }
void misalign(void*& data) { data = static_cast<std::byte*>(data) + 1; }

const Spoiled kSpoiled[] = {
    {"q of bool", "q", [](Arguments& a) { a.q.dtype = DType::kBool; }},
    {"q null", "q", [](Arguments& a) { a.q.data = nullptr; }},
    {"q misaligned", "q", [](Arguments& a) { misalign(a.q.data); }},
    {"q without rows", "q", [](Arguments& a) { a.q.sizes[2] = 0; }},
    {"q of negative size", "q", [](Arguments& a) { a.q.sizes[0] = -2; }},
    {"q of negative stride", "q", [](Arguments& a) { a.q.strides[1] = -24; }},
    {"q strides overflow", "q", [](Arguments& a) { a.q.strides[2] = kHuge / 2; }},
    {"q bytes overflow", "q", [](Arguments& a) { a.q.strides[2] = kHuge / 4; }},
    {"q sizes overflow", "q",
     [](Arguments& a) {
       a.q.sizes = {std::int64_t{1} << 30, std::int64_t{1} << 30, std::int64_t{1} << 30, 1};
       a.q.strides = {};
     }},
    {"q all zero", "q", [](Arguments& a) { a.q = {}; }},
    {"k null", "k", [](Arguments& a) { a.k.data = nullptr; }},
    {"k misaligned", "k", [](Arguments& a) { misalign(a.k.data); }},
    {"k of another dtype", "k", [](Arguments& a) { a.k.dtype = DType::kFloat16; }},
    {"k of another batch", "k", [](Arguments& a) { a.k.sizes[0] = 1; }},
    {"k of another head_dim", "k", [](Arguments& a) { a.k.sizes[3] = 7; }},
    {"k without heads", "k", [](Arguments& a) { a.k.sizes[1] = 0; }},
    {"heads that don't divide", "num_heads", [](Arguments& a) { a.k.sizes[1] = a.v.sizes[1] = 3; }},
    {"more key heads than heads", "num_heads",
     [](Arguments& a) { a.k.sizes[1] = a.v.sizes[1] = 8; }},
    {"k of negative stride", "k", [](Arguments& a) { a.k.strides[2] = -8; }},
    {"k strides overflow", "k", [](Arguments& a) { a.k.strides[2] = kHuge / 3; }},
    {"v null", "v", [](Arguments& a) { a.v.data = nullptr; }},
    {"v misaligned", "v", [](Arguments& a) { misalign(a.v.data); }},
    {"v of another dtype", "v", [](Arguments& a) { a.v.dtype = DType::kBFloat16; }},
    {"v of fewer keys", "v", [](Arguments& a) { a.v.sizes[2] = 9; }},
    {"v of other heads", "v", [](Arguments& a) { a.v.sizes[1] = 1; }},
    {"v without dim", "v", [](Arguments& a) { a.v.sizes[3] = 0; }},
    {"out null", "out", [](Arguments& a) { a.out.data = nullptr; }},
    {"out misaligned", "out", [](Arguments& a) { misalign(a.out.data); }},
    {"out of another dtype", "out", [](Arguments& a) { a.out.dtype = DType::kFloat16; }},
    {"out of another size", "out", [](Arguments& a) { a.out.sizes[3] = 8; }},
    {"out with stride 0", "out", [](Arguments& a) { a.out.strides[1] = 0; }},
    {"out with rows that overlap", "out", [](Arguments& a) { a.out.strides[2] = 5; }},
    {"out of negative stride", "out", [](Arguments& a) { a.out.strides[3] = -1; }},
    {"lse null", "lse", [](Arguments& a) { a.options.lse->data = nullptr; }},
    {"lse misaligned", "lse", [](Arguments& a) { misalign(a.options.lse->data); }},
    {"lse of 16 bits", "lse", [](Arguments& a) { a.options.lse->dtype = DType::kFloat16; }},
    {"lse of another size", "lse", [](Arguments& a) { a.options.lse->sizes[3] = 6; }},
    {"lse with stride 0", "lse", [](Arguments& a) { a.options.lse->strides[2] = 0; }},
    {"mask null", "mask", [](Arguments& a) { a.options.mask->data = nullptr; }},
    {"mask misaligned", "mask", [](Arguments& a) { misalign(a.options.mask->data); }},
    {"mask of another 16 bits", "mask",
     [](Arguments& a) { a.options.mask->dtype = DType::kFloat16; }},
    {"mask of fewer keys", "mask", [](Arguments& a) { a.options.mask->sizes[3] = 9; }},
    {"mask of two heads", "mask", [](Arguments& a) { a.options.mask->sizes[1] = 2; }},
    {"mask without rows", "mask", [](Arguments& a) { a.options.mask->sizes[2] = 0; }},
    {"mask of negative stride", "mask", [](Arguments& a) { a.options.mask->strides[3] = -1; }},
    {"mask strides overflow", "mask", [](Arguments& a) { a.options.mask->strides[3] = kHuge / 5; }},
    {"sinks null", "sinks", [](Arguments& a) { a.options.sinks->data = nullptr; }},
    {"sinks misaligned", "sinks", [](Arguments& a) { misalign(a.options.sinks->data); }},
    {"sinks of bool", "sinks", [](Arguments& a) { a.options.sinks->dtype = DType::kBool; }},
    {"sinks per key head", "sinks", [](Arguments& a) { a.options.sinks->sizes[1] = 2; }},
    {"sinks of negative stride", "sinks", [](Arguments& a) { a.options.sinks->strides[1] = -1; }},
    {"one kv_len for two", "kv_lens",
     [](Arguments& a) {
       a.kv_lens.pop_back();
       a.options.kv_lens = a.kv_lens;
     }},
    {"negative kv_len", "kv_lens", [](Arguments& a) { a.kv_lens[1] = -1; }},
    {"kv_len behind the end", "kv_lens", [](Arguments& a) { a.kv_lens[0] = 11; }},
    {"scale NaN", "scale", [](Arguments& a) { a.options.scale = std::nanf(""); }},
    {"scale Inf", "scale", [](Arguments& a) { a.options.scale = HUGE_VALF; }},
    {"softcap 0", "softcap", [](Arguments& a) { a.options.softcap = 0.0f; }},
    {"softcap negative", "softcap", [](Arguments& a) { a.options.softcap = -5.0f; }},
    {"softcap NaN", "softcap", [](Arguments& a) { a.options.softcap = std::nanf(""); }},
    {"softcap Inf", "softcap", [](Arguments& a) { a.options.softcap = HUGE_VALF; }},
    {"window.left negative", "window.left", [](Arguments& a) { a.options.window.left = -1; }},
    {"window.right negative", "window.right", [](Arguments& a) { a.options.window.right = -1; }},
    {"window.left too wide", "window.left", [](Arguments& a) { a.options.window.left = kHuge; }},
    {"q_offset too large", "q_offset", [](Arguments& a) { a.options.q_offset = kHuge; }},
    {"q_offset too small", "q_offset", [](Arguments& a) { a.options.q_offset = -kHuge - 1; }},
    {"scratch for not even a row", "max_scratch_bytes",
     [](Arguments& a) { a.options.run.max_scratch_bytes = 1; }},
    {"backend unknown", "backend", [](Arguments& a) { a.options.run.backend = "nonsense"; }},
};

void expect_names(const char* argument, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "was accepted";
  } catch (const InvalidArgument& e) {
    const std::string message = static_cast<const Error&>(e).what();
    EXPECT_EQ(e.argument(), argument) << message;
    EXPECT_EQ(message.rfind(std::string(argument) + ": expected ", 0), 0u) << message;
    EXPECT_NE(message.find(", got "), std::string::npos) << message;
  }
}

TEST(Validate, TheGoodCallIsGood) {
  ScriptedBackend::fresh();
  Arguments a;
  EXPECT_NO_THROW(scaled_dot_product_attention(a.q, a.k, a.v, a.out, a.options));
}

TEST(Validate, EachWrongArgumentIsNamed) {
  for (const Spoiled& spoiled : kSpoiled) {
    SCOPED_TRACE(spoiled.what);
    ScriptedBackend& backend = ScriptedBackend::fresh();
    Arguments a;
    spoiled.spoil(a);
    expect_names(spoiled.argument,
                 [&] { scaled_dot_product_attention(a.q, a.k, a.v, a.out, a.options); });
    EXPECT_TRUE(a.out_memory.untouched());
    EXPECT_TRUE(a.lse_memory.untouched());
    EXPECT_EQ(backend.log.runs_begun, 0);
  }
}

TEST(Validate, EachWrongShapeOfAPlanIsNamed) {
  ScriptedBackend::fresh();
  const struct {
    const char* argument;
    AttentionShape shape;
  } wrong[] = {
      {"batch", {.batch = 0}},
      {"num_heads", {.num_heads = -1}},
      {"num_kv_heads", {.num_kv_heads = 0}},
      {"num_heads", {.num_heads = 3, .num_kv_heads = 2}},
      {"q_len", {.q_len = 0}},
      {"kv_len", {.kv_len = -1}},
      {"head_dim", {.head_dim = 0}},
      {"value_dim", {.value_dim = 0}},
      {"dtype", {.dtype = DType::kBool}},
      {"batch", {.batch = kHuge}},
  };
  for (const auto& w : wrong) expect_names(w.argument, [&] { plan(w.shape); });
}

TEST(Validate, MergeState) {
  struct Merge {
    Tensor out_a{DType::kFloat32, {1, 2, 3, 4}}, lse_a{DType::kFloat32, {1, 2, 3, 1}};
    MutableTensorView a = out_a.mutable_view(), la = lse_a.mutable_view();
    TensorView b = out_a.view(), lb = lse_a.view();
  };
  const struct {
    const char* argument;
    void (*spoil)(Merge&);
  } wrong[] = {
      {"out_a", [](Merge& m) { m.a.data = nullptr; }},
      {"out_a", [](Merge& m) { m.a.dtype = DType::kBool; }},
      {"out_a", [](Merge& m) { m.a.strides[2] = 0; }},
      {"out_b", [](Merge& m) { m.b.dtype = DType::kFloat16; }},
      {"out_b", [](Merge& m) { m.b.sizes[2] = 2; }},
      {"out_b", [](Merge& m) { m.b.strides[2] = -1; }},
      {"lse_a", [](Merge& m) { m.la.sizes[3] = 4; }},
      {"lse_a", [](Merge& m) { m.la.dtype = DType::kFloat16; }},
      {"lse_a", [](Merge& m) { misalign(m.la.data); }},
      {"lse_a", [](Merge& m) { m.la.strides[2] = 0; }},
      {"lse_b", [](Merge& m) { m.lb.sizes[1] = 1; }},
      {"lse_b", [](Merge& m) { m.lb.data = nullptr; }},
  };
  for (const auto& w : wrong) {
    Merge m;
    m.out_a.poison();
    m.lse_a.poison();
    w.spoil(m);
    expect_names(w.argument, [&] { merge_state(m.a, m.la, m.b, m.lb); });
    EXPECT_TRUE(m.out_a.untouched());
    EXPECT_TRUE(m.lse_a.untouched());
  }
}

}  // namespace
}  // namespace keyfold::test

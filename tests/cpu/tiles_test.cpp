// The tile unit: its emulation against the documented sums, the processor's against its emulation.
#include "hwy/detect_compiler_arch.h"
#if HWY_ARCH_X86
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>

#include "cpu/kernels.hpp"
#include "cpu/tiles/emulated_unit.hpp"
#include "keyfold/error.hpp"
#include "support/case.hpp"
#include "support/environment.hpp"

namespace keyfold::test {
namespace {

using cpu::tiles::AmxUnit;
using cpu::tiles::EmulatedUnit;
using Words = std::array<std::uint32_t, 256>;

/// sum + a * b.
template <class Unit>
Words product(const Words& sum, const Words& a, const Words& b) {
  Words result;
  Unit::configure(16);
  Unit::template load<3>(sum.data(), 64);
  Unit::template load<4>(a.data(), 64);
  Unit::template load<7>(b.data(), 64);
  Unit::template dot<3, 4, 7>();
  Unit::template store<3>(result.data(), 64);
  Unit::release();
  return result;
}

bool can_be_emulated() {
  const ScopedEnv env("KEYFOLD_CPU_ISA", "amx_emulated");
  try {
    return !cpu::decode_as_prefill();
  } catch (const InvalidArgument&) {
    return false;
  }
}

float value(std::uint32_t bits) { return std::bit_cast<float>(bits); }

TEST(Tiles, TheEmulationSumsEvenAndOddProductsApart) {
  Rng rng("sums");
  Words sum, a, b;
  for (auto* words : {&sum, &a, &b})
    for (auto& word : *words) {
      const auto half = [&] { return std::bit_cast<std::uint32_t>(rng.normal()) >> 16; };
      word = words == &sum ? std::bit_cast<std::uint32_t>(rng.normal()) : half() << 16 | half();
    }
  const Words got = product<EmulatedUnit>(sum, a, b);
  for (std::size_t m = 0; m < 16; ++m)
    for (std::size_t n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (std::size_t k = 0; k < 16; ++k) {
        const std::uint32_t x = a[m * 16 + k], y = b[k * 16 + n];
        even = std::fma(value(x << 16), value(y << 16), even);
        odd = std::fma(value(x & 0xffff0000), value(y & 0xffff0000), odd);
      }
      EXPECT_EQ(value(got[m * 16 + n]), value(sum[m * 16 + n]) + (even + odd));
    }
}

TEST(Tiles, TheEmulationTakesSubnormalsAsZero) {
  Words sum{}, a{}, b{};
  a[0] = 0x0040;          // 2^-127, from element 0 of row 0
  b[0] = 0x7f00;          // 2^127
  a[16] = b[1] = 0x2000;  // 2^-63: the product is 2^-126, the least that is not 0
  a[32] = 0x1f80;         // 2^-64: times 2^-63 a subnormal
  sum[17] = sum[33] = 1;  // the least subnormal
  const Words got = product<EmulatedUnit>(sum, a, b);
  EXPECT_EQ(got[0], 0U);
  EXPECT_EQ(value(got[17]), 0x1p-126f);
  EXPECT_EQ(got[33], 0U);
}

TEST(Tiles, TheProcessorGivesTheBitsOfTheEmulation) {
  if (!cpu::tiles::amx_is_available()) GTEST_SKIP() << "no AMX: ABSENT on this machine";
  Rng rng("bits");
  for (int n = 0; n < 2000; ++n) {
    Words sum, a, b;
    // Exponents from the whole range in every other case, Inf and NaN among them.
    const std::uint32_t keep = n % 2 == 0 ? 0xffffffff : 0xbfffbfff;
    for (auto* words : {&sum, &a, &b})
      for (auto& word : *words)
        word = static_cast<std::uint32_t>(rng.between(0, 0xffffffff)) & keep;
    const Words expected = product<EmulatedUnit>(sum, a, b), got = product<AmxUnit>(sum, a, b);
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (std::isnan(value(expected[i])) && std::isnan(value(got[i]))) continue;
      ASSERT_EQ(got[i], expected[i]) << "case " << n << " element " << i;
    }
  }
}

/// A result of the kernels of this name.
std::vector<std::byte> result_of(const std::string& kernels, const Call& call) {
  const ScopedEnv env("KEYFOLD_CPU_ISA", kernels.c_str());
  Tensor out(call.q.dtype, call.out_sizes());
  AttentionOptions options = call.options;
  options.run.backend = "cpu";
  scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), options);
  return out.bytes();
}

TEST(Tiles, TheKernelsGiveTheBitsOfTheEmulatedOnes) {
  if (!cpu::tiles::amx_is_available()) GTEST_SKIP() << "no AMX: ABSENT on this machine";
  Rng rng("kernels");
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16})
    for (const std::int64_t q_len : {9, 20, 50})
      for (const std::int64_t head_dim : {5, 64, 128, 200}) {
        const Inputs inputs({.dtype = dtype,
                             .num_heads = 4,
                             .num_kv_heads = 1,
                             .q_len = q_len,
                             .kv_len = 1300,
                             .head_dim = head_dim,
                             .causal = true},
                            rng);
        const Call call = inputs.call();
        EXPECT_TRUE(result_of("amx_emulated", call) == result_of("avx512_amx", call))
            << "q_len " << q_len << " head_dim " << head_dim;
      }
}

TEST(Tiles, TakeNoDecodeCall) {
  if (!can_be_emulated()) GTEST_SKIP() << "no AVX2: ABSENT on this machine";
  std::vector<std::string> vectors = cpu::kernel_names();
  std::erase(vectors, "avx512_amx");
  Rng rng("decode");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const std::int64_t q_len : {1, 8, 9}) {
      const Inputs inputs(
          {.dtype = dtype, .num_heads = 8, .q_len = q_len, .kv_len = 1300, .head_dim = 64}, rng);
      const Call call = inputs.call();
      const bool same = result_of("amx_emulated", call) == result_of(vectors.front(), call);
      EXPECT_EQ(same, dtype == DType::kFloat32 || q_len <= 8) << "q_len " << q_len;
    }
}

}  // namespace
}  // namespace keyfold::test
#endif  // HWY_ARCH_X86

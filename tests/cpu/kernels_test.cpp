// The CPU's kernels: which there are, how one is forced, and their exponential.
#include "cpu/kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>

#include "support/case.hpp"
#include "support/environment.hpp"

namespace keyfold::test {
namespace {

constexpr const char* kVariable = "KEYFOLD_CPU_ISA";

DeviceInfo cpu_device() {
  const std::vector<DeviceInfo> all = devices();
  return *std::find_if(all.begin(), all.end(),
                       [](const DeviceInfo& d) { return d.backend == "cpu"; });
}

TEST(Kernels, EachHasItsOwnRunOfTheConformanceSuite) {
  std::istringstream list(KEYFOLD_TEST_KERNELS);
  std::vector<std::string> tested;
  for (std::string name; list >> name;) tested.push_back(name);
  for (const std::string& kernel : cpu_device().kernels)
    EXPECT_EQ(std::count(tested.begin(), tested.end(), kernel), 1) << kernel;
}

TEST(Kernels, TheForcedOneRuns) {
  Rng rng("forced");
  const Inputs inputs({.q_len = 3, .kv_len = 100}, rng);
  const Call call = inputs.call();
  const std::vector<std::string> names = cpu_device().kernels;
  ASSERT_FALSE(names.empty());
  for (const std::string& name : names) {
    const ScopedEnv env(kVariable, name.c_str());
    EXPECT_EQ(cpu_device().kernel, name);
    EXPECT_EQ(cpu_device().kernels, names);
    EXPECT_EQ(plan(call.shape()).kernel, name);
    Tensor out(DType::kFloat32, call.out_sizes());
    const Report report = scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view());
    EXPECT_EQ(report.kernel, name);
  }
  const ScopedEnv env(kVariable, nullptr);
  EXPECT_EQ(cpu_device().kernel, names.front());
}

TEST(Kernels, AnUnknownOneIsAnErrorThatListsThem) {
  const std::vector<std::string> names = cpu_device().kernels;
  for (const char* wrong : {"nonsense", "", "AVX2", "avx", "portable "}) {
    const ScopedEnv env(kVariable, wrong);
    for (const auto& call : {+[] { devices(); }, +[] { plan({.kv_len = 10}); }}) {
      try {
        call();
        ADD_FAILURE() << "'" << wrong << "' was accepted";
      } catch (const InvalidArgument& e) {
        const std::string message = static_cast<const Error&>(e).what();
        EXPECT_EQ(e.argument(), kVariable);
        EXPECT_NE(message.find("'" + std::string(wrong) + "'"), std::string::npos) << message;
        for (const std::string& name : names)
          EXPECT_NE(message.find(name), std::string::npos) << message;
      }
    }
  }
}

TEST(Kernels, BFloat16IsMultipliedInPairsWhereTheNameSaysSo) {
  for (const std::string& name : cpu::kernel_names()) {
    const ScopedEnv env(kVariable, name.c_str());
    const bool pairs = name.ends_with("_bf16") || name == "avx512_amx";
    EXPECT_EQ(cpu::selected_kernels().words(DType::kBFloat16, 9), pairs ? 5 : 9) << name;
    for (const DType dtype : {DType::kFloat32, DType::kFloat16})
      EXPECT_EQ(cpu::selected_kernels().words(dtype, 9), 9) << name;
  }
}

TEST(Kernels, TheExponentialIsWithinTwoUlp) {
  std::vector<float> x, y;
  const std::uint32_t step = by_scale(100003u, 10007u, 251u);
  const auto last = std::bit_cast<std::uint32_t>(-87.33f);
  for (std::uint32_t bits = 0x80000000u; bits < last; bits += step)
    x.push_back(std::bit_cast<float>(bits));
  y.resize(x.size());
  for (const std::string& name : cpu::kernel_names()) {
    const ScopedEnv env(kVariable, name.c_str());
    cpu::selected_kernels().exp(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    double worst = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp(static_cast<double>(x[i]));
      const double ulp = std::exp2(std::floor(std::log2(exact)) - 23);
      worst = std::max(worst, std::abs(y[i] - exact) / ulp);
    }
    EXPECT_LE(worst, 2) << name;

    const float special[5] = {0, -0.0f, -kInf, -1000, std::nanf("")};
    float result[5];
    cpu::selected_kernels().exp(special, result, 5);
    EXPECT_EQ(result[0], 1);
    EXPECT_EQ(result[1], 1);
    EXPECT_EQ(result[2], 0);
    EXPECT_EQ(result[3], 0);
    EXPECT_TRUE(std::isnan(result[4]));
  }
}

}  // namespace
}  // namespace keyfold::test

// What a machine says that has no driver, or no compiler.
#include <gtest/gtest.h>

#include <keyfold/attention.hpp>

#include "cuda/backend.hpp"
#include "cuda/compiler.hpp"
#include "cuda/driver.hpp"
#include "support/tensor.hpp"

namespace keyfold::cuda {
namespace {

TEST(Absence, WithoutADriverNothingIsListed) {
  if (Driver::get() != nullptr) GTEST_SKIP() << "this machine has a driver and a device";
  EXPECT_TRUE(make_backends().empty());
  const test::Tensor q(DType::kFloat32, {1, 1, 1, 8}), k(DType::kFloat32, {1, 1, 4, 8});
  test::Tensor out(DType::kFloat32, {1, 1, 1, 8});
  AttentionOptions options;
  options.run.backend = "cuda";
  try {
    scaled_dot_product_attention(q.view(), k.view(), k.view(), out.mutable_view(), options);
    FAIL() << "expected an error";
  } catch (const InvalidArgument& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("'cuda'"), std::string::npos) << what;
    EXPECT_NE(what.find("cpu"), std::string::npos) << what;
  }
}

TEST(Absence, ACompilerThatTheDriverIsTooOldForIsNotTaken) {
  try {
    const Nvrtc nvrtc(11080);
    FAIL() << "expected an error";
  } catch (const RunError& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    const std::string what = error.what();
    EXPECT_NE(what.find("NVRTC"), std::string::npos) << what;
    EXPECT_NE(what.find("CUDA 11.8"), std::string::npos) << what;
    EXPECT_NE(what.find("KEYFOLD_NVRTC"), std::string::npos) << what;
  }
}

}  // namespace
}  // namespace keyfold::cuda

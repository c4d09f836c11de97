// The fixture of every test that runs once per backend, through the public interface only.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/case.hpp"
#include "support/judge.hpp"

namespace keyfold::test {

/// KEYFOLD_TEST_BACKENDS (names divided by commas), else all that devices() lists.
std::vector<std::string> backend_names();

struct Outputs {
  Tensor out, lse;
  Report report;

  /// Bytes of out and lse.
  std::vector<std::byte> bytes() const;
};

class BackendTest : public testing::TestWithParam<std::string> {
 protected:
  /// Skips, and says so, where the backend is absent.
  void SetUp() override;

  /// Runs the call on this backend into poisoned outputs.
  Outputs run(const Call& call, RunOptions how = {}, Layout out_layout = Layout::kDense) const;
  /// Runs a case with fresh inputs and judges every row.
  void expect_right(const Case& c, Rng& rng, const RunOptions& how = {},
                    Layout out_layout = Layout::kDense) const;
  /// Judges these rows of finished outputs.
  void expect_right(const Call& call, const Outputs& got, const std::vector<RowId>& rows) const;
  /// Whether the backend keeps promise I5; if not, its documentation says so.
  bool decode_as_prefill() const;
  /// Keys per split of this call.
  std::int64_t split_len(const Call& call) const { return plan_of(call).split_len; }
  /// The same, of calls with a head_dim of 16.
  std::int64_t split_len(DType dtype, std::int64_t q_len) const;
  Plan plan_of(const Call& call, RunOptions how = {}) const;
};

#define KEYFOLD_FOR_EACH_BACKEND(Suite)                                                  \
  GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Suite);                                  \
  INSTANTIATE_TEST_SUITE_P(On, Suite, testing::ValuesIn(keyfold::test::backend_names()), \
                           [](const auto& backend) { return backend.param; })

}  // namespace keyfold::test

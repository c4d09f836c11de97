// The error rule: at most twice the naive computation's error against the float64 reference.
#pragma once

#include <gtest/gtest.h>

#include "support/reference.hpp"
#include "support/tensor.hpp"

namespace keyfold::test {

/// Fails unless, over the given rows, `out` and `lse` (skipped if null)
/// - are written everywhere and nothing but their elements is;
/// - hold Inf and NaN exactly where `exact` does;
/// - have an error, as the largest difference and as the root mean square, of at most twice that of
///   `plain` plus Rows::out_noise (of the largest of many: more) and half a unit in the last place.
testing::AssertionResult right(const Tensor& out, const Tensor* lse, const std::vector<RowId>& rows,
                               const Rows& exact, const Rows& plain);

}  // namespace keyfold::test

// The error rule: at most twice the naive computation's error against the float64 reference.
#include "support/judge.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

namespace keyfold::test {
namespace {

/// Half a unit in the last place of 1.
double rounding_unit(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

class Errors {
 public:
  explicit Errors(DType dtype) : dtype_(dtype) {}

  /// Empty, or what is wrong with one element that is not finite.
  std::string add(double got, double exact, double plain, double noise) {
    const auto expected = static_cast<double>(rounded(static_cast<float>(exact), dtype_));
    if (!std::isfinite(expected) || !std::isfinite(got)) {
      const bool same = std::isnan(expected) ? std::isnan(got) : got == expected;
      return same ? "" : "got " + std::to_string(got) + ", expected " + std::to_string(expected);
    }
    largest_ = std::max(largest_, std::abs(got - exact));
    naive_largest_ = std::max(naive_largest_, std::abs(plain - exact));
    square_ += (got - exact) * (got - exact);
    naive_square_ += (plain - exact) * (plain - exact);
    magnitude_ = std::max(magnitude_, std::abs(exact));
    exact_square_ += exact * exact;
    noise_ = std::max(noise_, noise);
    noise_square_ += noise * noise;
    ++count_;
    return "";
  }

  std::string verdict(const char* what) const {
    if (count_ == 0) return "";
    const double n = static_cast<double>(count_), unit = rounding_unit(dtype_);
    const double rms = std::sqrt(square_ / n), naive_rms = std::sqrt(naive_square_ / n);
    // Of n errors of one typical size the largest is about sqrt(2 ln n) times as large.
    const double floor = unit * magnitude_ + noise_ * std::max(1.0, std::sqrt(2 * std::log(n)));
    const double rms_floor = unit * std::sqrt(exact_square_ / n) + std::sqrt(noise_square_ / n);
    // Written so that NaN fails.
    if (largest_ <= 2 * naive_largest_ + floor && rms <= 2 * naive_rms + rms_floor) return "";
    const auto row = [](const char* name, double got, double plain, double extra) {
      char text[160];
      std::snprintf(text, sizeof text, "\n  %s error %.3g, naive %.3g, floor %.3g", name, got,
                    plain, extra);
      return std::string(text);
    };
    return std::string(what) +
           " is not accurate:" + row("largest", largest_, naive_largest_, floor) +
           row("rms", rms, naive_rms, rms_floor);
  }

 private:
  DType dtype_;
  double largest_ = 0, naive_largest_ = 0, square_ = 0, naive_square_ = 0;
  double magnitude_ = 0, exact_square_ = 0, noise_ = 0, noise_square_ = 0;
  std::int64_t count_ = 0;
};

std::string element_name(const char* what, const Dims& i) {
  std::string text = what;
  for (const std::int64_t x : i) text.append("[").append(std::to_string(x)).append("]");
  return text;
}

}  // namespace

testing::AssertionResult right(const Tensor& out, const Tensor* lse, const std::vector<RowId>& rows,
                               const Rows& exact, const Rows& plain) {
  Errors out_errors(out.dtype()), lse_errors(DType::kFloat32);
  const auto fail = [] { return testing::AssertionFailure(); };
  const auto value_dim = static_cast<std::size_t>(out.sizes()[3]);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    Dims i{rows[r].batch, rows[r].head, rows[r].row, 0};
    if (lse != nullptr) {
      if (lse->poisoned(i)) return fail() << element_name("lse", i) << " is not written";
      const std::string wrong = lse_errors.add(static_cast<double>(lse->at(i)), exact.lse[r],
                                               plain.lse[r], exact.lse_noise[r]);
      if (!wrong.empty()) return fail() << element_name("lse", i) << ": " << wrong;
    }
    for (std::size_t d = 0; d < value_dim; ++d) {
      i[3] = static_cast<std::int64_t>(d);
      if (out.poisoned(i)) return fail() << element_name("out", i) << " is not written";
      const std::size_t at = r * value_dim + d;
      const std::string wrong = out_errors.add(static_cast<double>(out.at(i)), exact.out[at],
                                               plain.out[at], exact.out_noise[at]);
      if (!wrong.empty()) return fail() << element_name("out", i) << ": " << wrong;
    }
  }
  if (!out.only_elements_written()) return fail() << "memory beside out is written";
  if (lse != nullptr && !lse->only_elements_written())
    return fail() << "memory beside lse is written";
  const std::string wrong = out_errors.verdict("out") + lse_errors.verdict("lse");
  return wrong.empty() ? testing::AssertionSuccess() : fail() << wrong;
}

}  // namespace keyfold::test

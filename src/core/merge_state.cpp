// merge_state: two finished results into one.
#include <cmath>

#include "core/half.hpp"
#include "core/validate.hpp"
#include "keyfold/attention.hpp"

namespace keyfold {
namespace {

/// weight * x, where a weight of 0 leaves out even Inf and NaN.
float weighted(float weight, float x) { return weight == 0 ? 0 : weight * x; }

}  // namespace

void merge_state(const MutableTensorView& out_a, const MutableTensorView& lse_a,
                 const TensorView& out_b, const TensorView& lse_b) {
  const Dims& sizes = out_a.sizes;
  if (out_a.dtype == DType::kBool) {
    throw InvalidArgument("out_a", "expected dtype float32, float16 or bfloat16, got bool");
  }
  if (out_b.dtype != out_a.dtype) {
    throw InvalidArgument("out_b", "expected dtype " + std::string(name_of(out_a.dtype)) +
                                       ", got " + std::string(name_of(out_b.dtype)));
  }
  const Dims rows{sizes[0], sizes[1], sizes[2], 1};
  core::check_view("out_a", out_a, true);
  core::check_sizes("out_b", out_b, sizes);
  core::check_view("out_b", out_b);
  for (const auto& [name, view] :
       {std::pair{"lse_a", TensorView(lse_a)}, std::pair{"lse_b", lse_b}}) {
    if (view.dtype != DType::kFloat32) {
      throw InvalidArgument(name,
                            "expected dtype float32, got " + std::string(name_of(view.dtype)));
    }
    core::check_sizes(name, view, rows);
  }
  core::check_view("lse_a", lse_a, true);
  core::check_view("lse_b", lse_b);

  for (std::int64_t b = 0; b < sizes[0]; ++b) {
    for (std::int64_t h = 0; h < sizes[1]; ++h) {
      for (std::int64_t i = 0; i < sizes[2]; ++i) {
        std::byte* lse = core::element(lse_a, b, h, i, 0);
        const float a = core::load_float(lse, DType::kFloat32);
        const float c = core::load_float(core::element(lse_b, b, h, i, 0), DType::kFloat32);
        const float most = a > c || a != a ? a : c;
        const bool empty = most == -INFINITY;
        const float weight_a = empty ? 0 : std::exp(a - most);
        const float weight_b = empty ? 0 : std::exp(c - most);
        const float sum = weight_a + weight_b;
        for (std::int64_t d = 0; d < sizes[3]; ++d) {
          std::byte* out = core::element(out_a, b, h, i, d);
          const float x = core::load_float(out, out_a.dtype);
          const float y = core::load_float(core::element(out_b, b, h, i, d), out_b.dtype);
          const float merged = weighted(weight_a, x) + weighted(weight_b, y);
          core::store_float(out, out_a.dtype, empty ? 0 : merged / sum);
        }
        core::store_float(lse, DType::kFloat32, empty ? most : most + std::log(sum));
      }
    }
  }
}

}  // namespace keyfold

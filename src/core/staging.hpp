// Results that are written only when all are there.
#pragma once

#include <optional>
#include <vector>

#include "core/copy_tensor.hpp"
#include "keyfold/plan.hpp"

namespace keyfold::core {

/// out and lse of a call whose rows come in several blocks: kept apart until the last is done.
class Staging {
 public:
  Staging(const AttentionShape& s, bool with_lse)
      : out_data_(static_cast<std::size_t>(bytes(s, false))),
        lse_data_(with_lse ? static_cast<std::size_t>(s.batch * s.num_heads * s.q_len) : 0),
        out_(out_data_.data(), s.dtype, {s.batch, s.num_heads, s.q_len, s.value_dim}) {
    if (with_lse) {
      lse_ =
          MutableTensorView(lse_data_.data(), DType::kFloat32, {s.batch, s.num_heads, s.q_len, 1});
    }
  }

  static std::int64_t bytes(const AttentionShape& s, bool with_lse) {
    const std::int64_t rows = s.batch * s.num_heads * s.q_len;
    return rows * (s.value_dim * size_of(s.dtype) + (with_lse ? 4 : 0));
  }

  const MutableTensorView& out() const { return out_; }
  const std::optional<MutableTensorView>& lse() const { return lse_; }

  void commit(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) const {
    copy_tensor(out_, out);
    if (lse) copy_tensor(*lse_, *lse);
  }

 private:
  std::vector<std::byte> out_data_;
  std::vector<float> lse_data_;
  MutableTensorView out_;
  std::optional<MutableTensorView> lse_;
};

}  // namespace keyfold::core

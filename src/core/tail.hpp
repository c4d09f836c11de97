// The ragged end of a stream of keys: less than one split, kept until the split is whole.
#pragma once

#include <cstring>
#include <vector>

#include "core/backend.hpp"
#include "core/half.hpp"

namespace keyfold::core {

/// Up to one split of keys and values, dense, in the inputs' dtype.
class Tail {
 public:
  Tail(const AttentionShape& s, std::int64_t split_len)
      : split_len_(split_len), k_(s, s.head_dim, split_len), v_(s, s.value_dim, split_len) {}

  std::int64_t size() const { return size_; }
  std::int64_t room() const { return split_len_ - size_; }
  void clear() { size_ = 0; }
  KeySource source(std::int64_t first_key) const {
    return {k_.view(split_len_), v_.view(split_len_), first_key};
  }

  /// Appends rows [begin, end) of k and v, which stand at absolute `first_key` and on; of a batch
  /// entry only those before its limit are read.
  void append(const TensorView& k, const TensorView& v, KeyRange rows, std::int64_t first_key,
              const std::vector<std::int64_t>& key_limit) {
    for (std::int64_t b = 0; b < k.sizes[0]; ++b) {
      const std::int64_t limit = key_limit[static_cast<std::size_t>(b)] - first_key + rows.begin;
      const KeyRange readable = rows.clip({rows.begin, limit});
      k_.append(k, b, readable, size_);
      v_.append(v, b, readable, size_);
    }
    size_ += rows.size();
  }

 private:
  class Buffer {
   public:
    Buffer(const AttentionShape& s, std::int64_t dim, std::int64_t split_len)
        : sizes_{s.batch, s.num_kv_heads, split_len, dim},
          dtype_(s.dtype),
          data_(static_cast<std::size_t>(s.batch * s.num_kv_heads * split_len * dim *
                                         size_of(s.dtype))) {}

    TensorView view(std::int64_t len) const {
      return {data_.data(), dtype_, {sizes_[0], sizes_[1], len, sizes_[3]}, dense_strides(sizes_)};
    }
    void append(const TensorView& from, std::int64_t batch, KeyRange rows, std::int64_t at) {
      const auto bytes = static_cast<std::size_t>(size_of(dtype_));
      const MutableTensorView to(data_.data(), dtype_, sizes_);
      for (std::int64_t h = 0; h < sizes_[1]; ++h) {
        for (std::int64_t i = rows.begin; i < rows.end; ++i) {
          std::byte* target = element(to, batch, h, at + i - rows.begin, 0);
          for (std::int64_t d = 0; d < sizes_[3]; ++d, target += bytes) {
            std::memcpy(target, element(from, batch, h, i, d), bytes);
          }
        }
      }
    }

   private:
    Dims sizes_;
    DType dtype_;
    std::vector<std::byte> data_;
  };

  std::int64_t split_len_;
  std::int64_t size_ = 0;
  Buffer k_, v_;
};

}  // namespace keyfold::core

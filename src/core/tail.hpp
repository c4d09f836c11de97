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

  /// Appends rows [begin, end) of the source; of a batch entry only those before its limit are
  /// read.
  void append(const KeySource& source, KeyRange rows, const std::vector<std::int64_t>& key_limit) {
    for (std::int64_t b = 0; b < source.k.sizes[0]; ++b) {
      const std::int64_t limit = key_limit[static_cast<std::size_t>(b)] - source.first_key;
      const KeyRange readable = rows.clip({rows.begin, limit});
      k_.append(source.k, source.k_device, b, readable, size_);
      v_.append(source.v, source.v_device, b, readable, size_);
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
    void append(const TensorView& from, const DevicePlace& device, std::int64_t batch,
                KeyRange rows, std::int64_t at) {
      if (rows.size() == 0) return;
      const auto bytes = static_cast<std::size_t>(size_of(dtype_));
      const MutableTensorView to(data_.data(), dtype_, sizes_);
      std::vector<std::byte> fetched;
      for (std::int64_t h = 0; h < sizes_[1]; ++h) {
        TensorView head = from;  // from its first row on, where the host can read it
        if (device.memory) {
          fetched = fetch(from, device, batch, h, rows);
          head.data = fetched.data();
        } else {
          head.data = element(from, batch, h, rows.begin, 0);
        }
        for (std::int64_t i = 0; i < rows.size(); ++i) {
          std::byte* target = element(to, batch, h, at + i, 0);
          for (std::int64_t d = 0; d < sizes_[3]; ++d, target += bytes) {
            std::memcpy(target, element(head, 0, 0, i, d), bytes);
          }
        }
      }
    }

   private:
    /// The bytes of one head from its first row to its last, with what lies between them.
    static std::vector<std::byte> fetch(const TensorView& from, const DevicePlace& device,
                                        std::int64_t batch, std::int64_t head, KeyRange rows) {
      const Dims& s = from.strides;
      const std::int64_t bytes = size_of(from.dtype);
      const std::int64_t first = batch * s[0] + head * s[1] + rows.begin * s[2];
      const std::int64_t count = (rows.size() - 1) * s[2] + (from.sizes[3] - 1) * s[3] + 1;
      std::vector<std::byte> data(static_cast<std::size_t>(count * bytes));
      device.memory->download(device.offset + first * bytes, data.data(), count * bytes);
      return data;
    }

    Dims sizes_;
    DType dtype_;
    std::vector<std::byte> data_;
  };

  std::int64_t split_len_;
  std::int64_t size_ = 0;
  Buffer k_, v_;
};

}  // namespace keyfold::core

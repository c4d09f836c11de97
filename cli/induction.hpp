// Induction heads built by hand: attention that finds where it saw the latest bytes before, and
// what followed them.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "keyfold/tensor.hpp"

namespace keyfold::cli {

/// Heads of an induction layer and the dtype of their tensors.
struct HeadShape {
  std::int64_t num_heads = 8;     ///< query heads, a multiple of num_kv_heads
  std::int64_t num_kv_heads = 2;  ///< key and value heads
  std::int64_t head_dim = 128;    ///< of keys and values; kMinHeadDim or more
  DType dtype = DType::kFloat16;  ///< float32, float16 or bfloat16
};

/// The keys and values of a text for induction heads, and their queries.
///
/// Key j stands for the bytes before position j, value j for the byte at j; the query of row i
/// stands for the bytes up to and with i, so it meets the keys where the same bytes came before.
/// A key is cut into one slice per order n in kOrders; each holds a pseudo-random code of +1 and -1
/// for the n bytes before j. A score thus counts agreeing minus disagreeing dimensions (times the
/// query's weights): longer matches agree in more slices, and the full match scores highest, for no
/// product of codes exceeds that of equal ones. Unrelated keys score about N(0, head_dim): the best
/// of 2^20 reaches 5 sqrt(head_dim), 55 of 128, so with scale 1 all of them together weigh
/// 2^20 e^(128/2 - 128) = e^-50 of the match; a tie has probability 2^-head_dim each. Each
/// key/value head has codes of its own; the query heads that share it weigh the orders differently.
class InductionHeads {
 public:
  static constexpr std::array<std::int64_t, 6> kOrders{1, 2, 4, 8, 16, 24};
  /// Below this, chance agreements of a million keys would come close to the match.
  static constexpr std::int64_t kMinHeadDim = 64;
  /// The scale that the scores above are meant for.
  static constexpr float kScale = 1.0F;

  /// Bytes that keys and values of `capacity` positions take.
  static std::int64_t cache_bytes(const HeadShape& shape, std::int64_t capacity);

  /// Without keys, with room for those of `capacity` positions; `seed` chooses the codes. `before`
  /// is the text before the first of them, of which the last 24 bytes matter.
  InductionHeads(const HeadShape& shape, std::uint64_t seed, std::int64_t capacity,
                 std::string before = {});

  /// Adds the keys and values of the next bytes; at most `capacity` in all.
  void append(std::string_view bytes);

  TensorView keys() const { return cache_view(keys_.get()); }
  TensorView values() const { return cache_view(values_.get()); }

  /// Fills in the queries of the last `count` positions of the text; valid until the next call.
  TensorView queries(std::int64_t count);

  /// Where attention writes the outputs of the latest queries().
  MutableTensorView output();

  /// The byte whose value code is nearest to the last row of output(), summed over the heads.
  char next_byte() const;

 private:
  using Suffixes = std::array<std::uint64_t, kOrders.size()>;

  std::int64_t row_bytes() const { return shape_.head_dim * size_of(shape_.dtype); }
  TensorView cache_view(const std::byte* data) const;
  Suffixes suffixes(std::int64_t position) const;
  void write_code(std::byte* row, const Suffixes& suffixes, std::int64_t kv_head,
                  std::size_t doubled_order) const;
  const std::byte* value_code(std::int64_t kv_head, char byte) const;

  HeadShape shape_;
  std::uint64_t seed_;
  std::int64_t capacity_;
  std::string text_;
  std::int64_t first_;                          // position of the first key in text_
  std::unique_ptr<std::byte[]> keys_, values_;  // [num_kv_heads, capacity, head_dim]
  std::vector<std::byte> value_codes_;          // [num_kv_heads, 256, head_dim]
  std::vector<std::byte> queries_, output_;     // [num_heads, query_count_, head_dim]
  std::int64_t query_count_ = 0;
};

}  // namespace keyfold::cli

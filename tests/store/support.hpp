// Calls over files beside the same calls over arrays.
#pragma once

#include <functional>

#include "../io/files.hpp"
#include "io/npy.hpp"
#include "keyfold/kv_store.hpp"
#include "support/case.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace keyfold::test {

using io::test::load;
using io::test::save;
using io::test::TemporaryFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

inline std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// The elements of a view, dense and in order.
inline std::string bytes_of(const TensorView& t) {
  const auto size = static_cast<std::size_t>(size_of(t.dtype));
  std::string bytes;
  for (std::int64_t b = 0; b < t.sizes[0]; ++b)
    for (std::int64_t h = 0; h < t.sizes[1]; ++h)
      for (std::int64_t i = 0; i < t.sizes[2]; ++i)
        for (std::int64_t d = 0; d < t.sizes[3]; ++d) {
          const std::int64_t at =
              b * t.strides[0] + h * t.strides[1] + i * t.strides[2] + d * t.strides[3];
          bytes.append(static_cast<const char*>(t.data) + at * size_of(t.dtype), size);
        }
  return bytes;
}

/// out and lse of a call, poisoned before.
struct Result {
  explicit Result(const Call& call)
      : out(call.q.dtype, call.out_sizes()),
        lse(DType::kFloat32, {call.q.sizes[0], call.q.sizes[1], call.q.sizes[2], 1}) {
    out.poison();
    lse.poison();
  }
  std::string bytes() const { return text_of(out.bytes()) + text_of(lse.bytes()); }
  bool untouched() const { return out.untouched() && lse.untouched(); }

  Tensor out, lse;
};

inline AttentionOptions options_of(const Call& call, Result& result,
                                   std::optional<std::int64_t> max_scratch = {}) {
  AttentionOptions options = call.options;
  options.lse = result.lse.mutable_view();
  options.run.max_scratch_bytes = max_scratch;
  return options;
}

inline std::string run_arrays(const Call& call) {
  Result result(call);
  scaled_dot_product_attention(call.q, call.k, call.v, result.out.mutable_view(),
                               options_of(call, result));
  return result.bytes();
}

inline std::string run_source(const Call& call, KeyValueSource& source,
                              std::optional<std::int64_t> max_scratch = {}) {
  Result result(call);
  scaled_dot_product_attention(call.q, source, result.out.mutable_view(),
                               options_of(call, result, max_scratch));
  return result.bytes();
}

inline void save_npy(const std::string& path, const TensorView& t, std::size_t skip = 0) {
  save(path, io::npy_header(t.dtype, std::span(t.sizes).subspan(skip)) + bytes_of(t));
}

/// All keys and values of a source, in pieces as they come.
inline std::string read_all(KeyValueSource& source, std::int64_t begin, std::int64_t end) {
  source.seek(begin, end);
  std::string k, v;
  for (;;) {
    const KeyValuePiece piece = source.next();
    if (piece.size() == 0) break;
    k += bytes_of(piece.k);
    v += bytes_of(piece.v);
  }
  return k + v;
}

/// Keys and values that can be told apart by their position, batch and head.
inline std::pair<Tensor, Tensor> numbered(const KeyValueShape& s, std::int64_t first,
                                          std::int64_t count) {
  Tensor k(s.dtype, {s.batch, s.num_kv_heads, count, s.head_dim});
  Tensor v(s.dtype, {s.batch, s.num_kv_heads, count, s.value_dim});
  const auto fill = [&](Tensor& t, int kind) {
    t.each([&](const Dims& i) {
      const auto n = static_cast<std::uint64_t>(((first + i[2]) * 31 + i[0] * 7 + i[1]) * 577 +
                                                i[3] * 3 + kind);
      t.set(i, static_cast<float>(n * 2654435761 % 4096) / 64.0F - 32.0F);
    });
  };
  fill(k, 0);
  fill(v, 1);
  return {std::move(k), std::move(v)};
}

/// Appends the next keys of the numbering.
inline void append_numbered(KvStore& store, std::int64_t count) {
  const auto [k, v] = numbered(store.shape(), store.size(), count);
  store.append(k.view(), v.view());
}

/// Compares keys [begin, end) with the numbering.
inline void expect_numbered(KeyValueSource& source, std::int64_t begin, std::int64_t end) {
  source.seek(begin, end);
  std::int64_t at = begin;
  for (;;) {
    const KeyValuePiece piece = source.next();
    if (piece.size() == 0) break;
    const auto [k, v] = numbered(source.shape(), at, piece.size());
    ASSERT_TRUE(bytes_of(piece.k) == bytes_of(k.view())) << "keys from " << at;
    ASSERT_TRUE(bytes_of(piece.v) == bytes_of(v.view())) << "values from " << at;
    at += piece.size();
  }
  EXPECT_EQ(at, end);
}
inline void expect_numbered(const KvStore& store, std::int64_t begin, std::int64_t end) {
  expect_numbered(*store.source(), begin, end);
}

}  // namespace keyfold::test

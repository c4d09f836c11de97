// Keys and values read from their rows give the bits of packed ones, and rows end as core says.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/half.hpp"
#include "core/normalise.hpp"
#include "cpu/kernels.hpp"
#include "support/environment.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace keyfold::test {
namespace {

using cpu::kDirectRows;
using cpu::kMaxDim;
using cpu::kMaxRowTile;
using cpu::kPanel;
using cpu::kScoreStride;
using cpu::kSplitLen;

const std::vector<DType> kDTypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

/// Rows of a tensor with its own memory: `dim_step` elements between neighbours, `gap` between
/// rows; nothing behind the last element may be read, and NaN is wherever no element is.
struct Rows {
  Rows(DType dtype, std::int64_t count, std::int64_t dim, std::int64_t dim_step, std::int64_t gap,
       Rng& rng)
      : bytes(
            static_cast<std::size_t>(
                ((count - 1) * (dim * dim_step + gap) + (dim - 1) * dim_step + 1) * size_of(dtype)),
            std::byte{0xff}),
        source{bytes.data(), dtype, (dim * dim_step + gap) * size_of(dtype),
               dim_step * size_of(dtype), dim} {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t d = 0; d < dim; ++d) set(i, d, rng.normal());
  }
  void set(std::int64_t row, std::int64_t d, float value) {
    core::store_float(bytes.data() + row * source.row_stride + d * source.dim_stride, source.dtype,
                      value);
  }
  cpu::RowSource from(std::int64_t row) const {
    cpu::RowSource rows = source;
    rows.data += row * source.row_stride;
    return rows;
  }

  std::vector<std::byte> bytes;
  cpu::RowSource source;
};

/// A tile of `num_rows` query rows of which some see fewer keys, with its memory.
struct QueryTile {
  QueryTile(const cpu::Kernels& kernels, DType dtype, std::int64_t num_rows, std::int64_t head_dim,
            std::int64_t value_dim, std::int64_t num_keys, Rng& rng)
      : padded_dim((value_dim + 15) / 16 * 16),
        scores(static_cast<std::size_t>(num_rows * kScoreStride), kNaN),
        o(static_cast<std::size_t>(num_rows * padded_dim), kNaN),
        m(kMaxRowTile),
        l(kMaxRowTile) {
    const Rows queries(dtype, num_rows, head_dim, 1, 0, rng);
    tile.num_rows = num_rows;
    tile.words = kernels.words(dtype, head_dim);
    q.resize(static_cast<std::size_t>(num_rows * kMaxDim));
    // Panels that a mask hides from all rows, and from some.
    const auto panels = [&] {
      return static_cast<cpu::Panels>(rng.one_in(2) ? 0xff : rng.between(1, 0xff));
    };
    const cpu::Panels shown = panels();
    for (std::int64_t r = 0; r < num_rows; ++r) {
      kernels.pack_q(queries.from(r), q.data() + r * kMaxDim);
      const std::int64_t begin = rng.one_in(2) ? 0 : rng.between(0, num_keys - 1);
      const std::int64_t end = rng.one_in(2) ? num_keys : rng.between(begin + 1, num_keys);
      const cpu::Panels within = cpu::panels_of(begin, end);
      tile.see(r, begin, end, within & shown & panels());
    }
    if (tile.panels == 0) tile.see(0, 0, num_keys, cpu::panels_of(0, num_keys));
    tile.padded_value_dim = padded_dim;
    tile.scale = 0.1f;
  }
  cpu::Tile bound() {
    tile.q = q.data();
    tile.scores = scores.data();
    return tile;
  }
  bool sees(std::int64_t key) const { return (tile.panels >> key / kPanel & 1) != 0; }
  cpu::RowState result() { return {o.data(), m.data(), l.data()}; }

  std::int64_t padded_dim;
  cpu::Tile tile;
  std::vector<float> q, scores, o, m, l;
};

struct Variant {
  DType dtype;
  std::int64_t num_rows, head_dim, value_dim, num_keys, dim_step, gap;
};

std::ostream& operator<<(std::ostream& to, const Variant& v) {
  return to << size_of(v.dtype) << " bytes (" << static_cast<int>(v.dtype) << "), rows "
            << v.num_rows << ", head_dim " << v.head_dim << ", value_dim " << v.value_dim
            << ", keys " << v.num_keys << ", dim_step " << v.dim_step << ", gap " << v.gap;
}

/// The bits, but of a NaN only that it is one: which operand's it is, the compiler chooses.
std::vector<std::uint32_t> bits_of(const float* values, std::int64_t count) {
  std::vector<std::uint32_t> bits;
  for (std::int64_t i = 0; i < count; ++i)
    bits.push_back(std::bit_cast<std::uint32_t>(values[i] == values[i] ? values[i] : kNaN));
  return bits;
}

/// Scores, weights and outputs from rows, and from panels, panel by panel as the schedules call.
void expect_same_bits(const cpu::Kernels& kernels, const Variant& v, Rng& rng, bool hostile) {
  SCOPED_TRACE(testing::Message() << kernels.name << ": " << v);
  QueryTile direct(kernels, v.dtype, v.num_rows, v.head_dim, v.value_dim, v.num_keys, rng);
  Rows keys(v.dtype, v.num_keys, v.head_dim, v.dim_step, v.gap, rng);
  Rows values(v.dtype, v.num_keys, v.value_dim, v.dim_step, v.gap, rng);
  const cpu::Tile& tile = direct.tile;
  if (hostile) {  // where no row may look, and where some may
    for (std::int64_t key = 0; key < v.num_keys; ++key) {
      if (key >= tile.first && key < tile.last && !rng.one_in(40)) continue;
      keys.set(key, rng.between(0, v.head_dim - 1), rng.one_in(2) ? kNaN : kInf);
      values.set(key, rng.between(0, v.value_dim - 1), rng.one_in(2) ? kNaN : -kInf);
    }
  }
  QueryTile packed = direct;
  const auto panels = [&](const auto& body) {
    for (std::int64_t key = tile.first / kPanel * kPanel; key < tile.last; key += kPanel)
      if (direct.sees(key)) body(key, std::min(kPanel, v.num_keys - key));
  };

  panels([&](std::int64_t key, std::int64_t count) {
    std::vector<float> panel(static_cast<std::size_t>(tile.words * kPanel));
    kernels.pack_k(keys.from(key), count, panel.data());
    kernels.score(packed.bound(), v.dtype, panel.data(), key, key + kPanel);
  });
  // All at once, or in panels.
  const std::int64_t begin = tile.first / kPanel * kPanel;
  const bool at_once = rng.one_in(2) && std::has_single_bit(tile.panels + (1U << begin / kPanel));
  if (at_once) {
    kernels.score_rows(direct.bound(), keys.from(begin), begin, v.num_keys);
  } else {
    panels([&](std::int64_t key, std::int64_t count) {
      kernels.score_rows(direct.bound(), keys.from(key), key, key + count);
    });
  }
  const auto expect_scores = [&](std::int64_t r, std::int64_t first, std::int64_t last,
                                 cpu::Panels seen, const char* which) {
    for (std::int64_t key = first; key < last; ++key) {
      if ((seen >> key / kPanel & 1) == 0) continue;
      const std::int64_t at = r * kScoreStride + key;
      ASSERT_EQ(bits_of(direct.scores.data() + at, 1), bits_of(packed.scores.data() + at, 1))
          << which << " of row " << r << " and key " << key;
    }
  };
  for (std::int64_t r = 0; r < v.num_rows; ++r)
    expect_scores(r, tile.begin[r], tile.end[r], tile.seen[r], "score");

  kernels.softmax(direct.bound(), direct.result());
  kernels.softmax(packed.bound(), packed.result());
  for (std::int64_t r = 0; r < v.num_rows; ++r)
    expect_scores(r, tile.first, tile.last, tile.panels, "weight");
  panels([&](std::int64_t key, std::int64_t count) {
    std::vector<float> widened(static_cast<std::size_t>(direct.padded_dim * kPanel));
    kernels.pack_v(values.from(key), count, direct.padded_dim, widened.data());
    kernels.weigh(packed.bound(), widened.data(), key, key + kPanel, packed.result());
    if (!at_once)
      kernels.weigh_rows(direct.bound(), values.from(key), key, key + count, direct.result());
  });
  if (at_once)
    kernels.weigh_rows(direct.bound(), values.from(begin), begin, v.num_keys, direct.result());
  // As the schedules do, where a value that some row does not see is Inf or NaN.
  for (QueryTile* rows : {&direct, &packed}) {
    if (kernels.all_finite(rows->bound(), rows->result())) continue;
    panels([&](std::int64_t key, std::int64_t count) {
      std::vector<float> widened(static_cast<std::size_t>(direct.padded_dim * kPanel));
      kernels.pack_v(values.from(key), count, direct.padded_dim, widened.data());
      kernels.weigh_exactly(rows->bound(), widened.data(), key, key + kPanel, rows->result());
    });
  }
  const auto bits = [](const std::vector<float>& of) {
    return bits_of(of.data(), static_cast<std::int64_t>(of.size()));
  };
  ASSERT_EQ(bits(direct.o), bits(packed.o));
  ASSERT_EQ(bits(direct.m), bits(packed.m));
  ASSERT_EQ(bits(direct.l), bits(packed.l));
}

TEST(Direct, GivesTheBitsOfPackedKeysAndValues) {
  Rng rng("direct");
  for (const std::string& name : cpu::kernel_names()) {
    const ScopedEnv env("KEYFOLD_CPU_ISA", name.c_str());
    const cpu::Kernels& kernels = cpu::selected_kernels();
    for (const DType dtype : kDTypes)
      for (std::int64_t num_rows = 1; num_rows <= kDirectRows; ++num_rows)
        for (int n = 0; n < by_scale(6, 30, 100) && !testing::Test::HasFailure(); ++n) {
          const Variant v{
              .dtype = dtype,
              .num_rows = num_rows,
              .head_dim = rng.one_in(3) ? rng.between(1, 90)
                                        : rng.pick<std::int64_t>({16, 40, 64, 80, 128, kMaxDim}),
              .value_dim = rng.one_in(3) ? rng.between(1, 90)
                                         : rng.pick<std::int64_t>({16, 48, 64, 80, 128, kMaxDim}),
              .num_keys = rng.one_in(3) ? rng.pick<std::int64_t>({1, 64, kSplitLen})
                                        : rng.between(1, kSplitLen),
              .dim_step = rng.one_in(4) ? 2 : 1,
              .gap = rng.one_in(2) ? 0 : rng.between(1, 70)};
          expect_same_bits(kernels, v, rng, rng.one_in(2));
        }
  }
}

TEST(Direct, RowsEndAsTheCoreSays) {
  Rng rng("end");
  for (const std::string& name : cpu::kernel_names()) {
    const ScopedEnv env("KEYFOLD_CPU_ISA", name.c_str());
    for (const DType dtype : kDTypes)
      for (const std::int64_t dim : {1, 7, 16, 33, 128})
        for (const auto& [weight, l] : {std::pair{1.0f, 1.0f},
                                        {1.0f, 3.0f},
                                        {0.3f, 1.0f},
                                        {1.0f, 0.0f},
                                        {0.0f, 2.0f},
                                        {1.0f, kNaN}}) {
          std::vector<float> o(static_cast<std::size_t>((dim + 15) / 16 * 16), 0.0f);
          for (float& x : o) {
            x = rng.normal() * rng.pick<float>({1, 1, 1e-6f, 1e5f, 1e-42f, 1e38f, 0, -0.0f, kInf});
            if (rng.one_in(2))  // ties of both 16-bit dtypes
              x = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) &
                                       rng.pick<std::uint32_t>({0xffff8000u, 0xfffff000u}));
            if (rng.one_in(20)) x = rng.one_in(2) ? kNaN : -kNaN;
          }
          const core::RowEnd end{.weight = weight, .l = l};
          for (const std::int64_t step : {1, 3}) {
            const auto bytes =
                static_cast<std::size_t>((dim - 1) * step * size_of(dtype) + size_of(dtype));
            std::vector<std::byte> got(bytes, std::byte{0x5a}), expected = got;
            cpu::selected_kernels().finish_row(end, o.data(), dim, dtype, got.data(),
                                               step * size_of(dtype));
            for (std::int64_t i = 0; i < dim; ++i)
              core::store_float(expected.data() + i * step * size_of(dtype), dtype,
                                core::normalised(end, o[static_cast<std::size_t>(i)]));
            if (dtype == DType::kFloat32) {  // a NaN's bits are the processor's own
              for (std::int64_t i = 0; i < dim; ++i) {
                float a = 0, b = 0;
                std::memcpy(&a, got.data() + i * step * 4, 4);
                std::memcpy(&b, expected.data() + i * step * 4, 4);
                if (a != a && b != b) std::memcpy(got.data() + i * step * 4, &b, 4);
              }
            }
            ASSERT_EQ(got, expected) << name << ", dtype " << static_cast<int>(dtype) << ", dim "
                                     << dim << ", weight " << weight << ", l " << l;
          }
        }
  }
}

}  // namespace
}  // namespace keyfold::test

// What is hidden: rows and chunks that see nothing, and hidden keys that hold NaN and Inf.
#include <cmath>

#include "support/backends.hpp"

namespace keyfold::test {
namespace {

class Masks : public BackendTest {
 protected:
  /// Fills keys [begin, end) of every head with what must not leak.
  static void spoil(Inputs& inputs, std::int64_t begin, std::int64_t end) {
    for (Tensor* t : {&inputs.k, &inputs.v})
      t->each([&](const Dims& i) {
        if (i[2] >= begin && i[2] < end) t->set(i, (i[2] + i[3]) % 2 ? kNaN : kInf);
      });
  }
  void expect_right_all(const Inputs& inputs, const RunOptions& how = {}) const {
    const Call call = inputs.call();
    expect_right(call, run(call, how), all_rows(call.q));
  }
};
KEYFOLD_FOR_EACH_BACKEND(Masks);

TEST_P(Masks, RowsThatSeeNothingGiveZero) {
  Rng rng("nothing");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const bool sinks : {false, true})
      for (const Mask mask : {Mask::kBool, Mask::kAdditive}) {
        Inputs inputs({.dtype = dtype,
                       .q_len = 5,
                       .kv_len = 1100,
                       .head_dim = 16,
                       .mask = mask,
                       .sinks = sinks},
                      rng);
        inputs.mask.each([&](const Dims& i) {
          if (i[2] != 3) inputs.mask.set(i, mask == Mask::kBool ? 0 : -kInf);
        });
        const Outputs got = run(inputs.call());
        got.out.each([&](const Dims& i) { EXPECT_TRUE(i[2] == 3 || got.out.at(i) == 0); });
        got.lse.each([&](const Dims& i) {
          const float nothing = sinks ? inputs.sinks.at({0, i[1], 0, 0}) : -kInf;
          EXPECT_TRUE(i[2] == 3 || got.lse.at(i) == nothing);
        });
        expect_right(inputs.call(), got, all_rows(inputs.call().q));
      }
}

TEST_P(Masks, NoKeysAtAll) {
  Rng rng("no keys");
  for (const bool sinks : {false, true}) {
    expect_right({.batch = 2, .q_len = 3, .kv_len = 0, .sinks = sinks}, rng);
    expect_right({.batch = 3, .q_len = 3, .kv_len = 50, .sinks = sinks, .kv_lens = {0, 50, 0}},
                 rng);
    expect_right({.q_len = 3, .kv_len = 50, .causal = true, .q_offset = -100, .sinks = sinks}, rng);
    expect_right({.q_len = 3, .kv_len = 50, .q_offset = 1000, .window = {10, {}}, .sinks = sinks},
                 rng);
  }
}

TEST_P(Masks, WindowsBehindTheLastKey) {
  Rng rng("behind");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16})
    for (const std::int64_t q_len : {1, 6, 40})
      for (const std::int64_t head_dim : {24, 256})
        for (const std::int64_t key_limit : {215, 530})
          expect_right({.dtype = dtype,
                        .batch = 2,
                        .q_len = q_len,
                        .kv_len = 800,
                        .head_dim = head_dim,
                        .causal = true,
                        .q_offset = 600,
                        .window = {17, {}},
                        .kv_lens = {key_limit, 800}},
                       rng);
}

TEST_P(Masks, ChunksThatNobodySees) {
  Rng rng("masked chunks");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    Inputs inputs({.dtype = dtype, .q_len = 4, .kv_len = 10, .head_dim = 16}, rng);
    const std::int64_t split = split_len(inputs.call());
    // Hide the first, a middle, the last chunk, and all but the middle one.
    const std::vector<std::vector<bool>> hidden = {
        {true, false, false}, {false, true, false}, {false, false, true}, {true, false, true}};
    for (const Mask mask : {Mask::kBool, Mask::kAdditive})
      for (const std::vector<bool>& hide : hidden) {
        Inputs masked({.dtype = dtype,
                       .q_len = 4,
                       .kv_len = 2 * split + 7,
                       .head_dim = 16,
                       .mask = mask,
                       .mask_broadcast = {true, true, false, false}},
                      rng);
        masked.mask.each([&](const Dims& i) {
          if (hide[static_cast<std::size_t>(i[3] / split)])
            masked.mask.set(i, mask == Mask::kBool ? 0 : -kInf);
        });
        for (std::size_t s = 0; s < hide.size(); ++s)
          if (hide[s]) {
            const auto begin = static_cast<std::int64_t>(s) * split;
            spoil(masked, begin, begin + split);
          }
        RunOptions how;
        how.chunk_size = split;
        expect_right_all(masked, how);
      }
  }
}

TEST_P(Masks, KeysHiddenFromAllRowsNeverLeak) {
  Rng rng("leaks");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const std::int64_t q_len : {1, 9, 40}) {
      const Case base{.dtype = dtype, .q_len = q_len, .kv_len = 1200, .head_dim = 24};
      Case c = base;
      c.causal = true, c.q_offset = 500;
      Inputs causal(c, rng);
      spoil(causal, 500 + q_len, 1200);
      expect_right_all(causal);

      c = base;
      c.window.left = 100;
      Inputs window(c, rng);
      spoil(window, 0, 1200 - q_len - 100);
      expect_right_all(window);

      c = base;
      c.batch = 2, c.kv_lens = {700, 513};  // Inputs spoils what is behind them
      expect_right_all(Inputs(c, rng));

      for (const Mask mask : {Mask::kBool, Mask::kAdditive, Mask::kAdditiveSameDType}) {
        c = base;
        c.mask = mask;
        Inputs masked(c, rng);
        const float hide = mask == Mask::kBool ? 0.0f : -kInf;
        masked.mask.each([&](const Dims& i) {
          if (i[3] % 7 == 2) masked.mask.set(i, hide);
        });
        for (std::int64_t key = 2; key < 1200; key += 7) spoil(masked, key, key + 1);
        expect_right_all(masked);
      }
    }
}

TEST_P(Masks, KeysHiddenFromSomeRowsLeakToTheOthersOnly) {
  Rng rng("some rows");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const Layout layout : {Layout::kDense, Layout::kSliced}) {
      // Only the last query row sees the last key.
      Inputs causal({.dtype = dtype,
                     .q_len = 20,
                     .kv_len = 530,
                     .head_dim = 24,
                     .causal = true,
                     .layout = layout},
                    rng);
      spoil(causal, 529, 530);
      expect_right_all(causal);
      Inputs window({.dtype = dtype,
                     .q_len = 20,
                     .kv_len = 600,
                     .head_dim = 24,
                     .window = {100, 0},
                     .layout = layout},
                    rng);
      spoil(window, 485, 487);
      expect_right_all(window);
      Inputs masked({.dtype = dtype,
                     .q_len = 20,
                     .kv_len = 530,
                     .head_dim = 24,
                     .mask = Mask::kBool,
                     .layout = layout},
                    rng);
      spoil(masked, 100, 101);
      spoil(masked, 520, 521);
      expect_right_all(masked);
    }
}

TEST_P(Masks, AnAdditiveMaskThatHidesAgreesWithABoolMask) {
  Rng rng("agree");
  for (const DType dtype : {DType::kFloat32, DType::kFloat16}) {
    Inputs with_bool({.dtype = dtype, .q_len = 12, .kv_len = 700, .mask = Mask::kBool}, rng);
    Inputs additive({.dtype = dtype, .q_len = 12, .kv_len = 700, .mask = Mask::kAdditive}, rng);
    additive.mask.each(
        [&](const Dims& i) { additive.mask.set(i, with_bool.mask.at(i) != 0 ? 0 : -kInf); });
    Call call = with_bool.call();
    const Outputs one = run(call);
    call.options.mask = additive.mask.view();
    EXPECT_EQ(one.bytes(), run(call).bytes());
  }
}

TEST_P(Masks, TilesThatAMaskHides) {
  Rng rng("tiles");
  struct Variant {
    std::int64_t q_len;
    Mask mask;
    std::array<bool, 4> broadcast;
  };
  const std::vector<Variant> variants = {
      {3, Mask::kBool, {true, true, false, false}},
      {150, Mask::kBool, {}},
      {150, Mask::kAdditive, {false, true, true, false}},
      {150, Mask::kAdditiveSameDType, {true, true, false, false}},
      {700, Mask::kAdditive, {true, true, false, false}},
      {700, Mask::kBool, {true, false, false, false}}};
  constexpr std::int64_t kKeys = 2'200, kBlock = 192;  // no multiple of most kernels' tiles
  const auto hides = [&](std::int64_t row, std::int64_t key) {
    const std::int64_t block = key / kBlock;
    return block % 5 == 4 || (row / 64 + block) % 3 == 0 || row % 100 == 7;
  };
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
    for (const auto& [q_len, mask, broadcast] : variants) {
      const bool many = q_len > 500;  // rows that are folded split after split
      if (many && dtype != DType::kFloat16) continue;
      Inputs inputs({.dtype = dtype,
                     .batch = many ? 1 : 2,
                     .q_len = q_len,
                     .kv_len = kKeys,
                     .head_dim = 8,
                     .mask = mask,
                     .mask_broadcast = broadcast},
                    rng);
      const float shown = mask == Mask::kBool ? 1 : 0, hidden = mask == Mask::kBool ? 0 : -kInf;
      inputs.mask.each([&](const Dims& i) {
        if (hides(i[2], i[3])) inputs.mask.set(i, hidden);
        // Behind, what is not hidden keeps its value.
        else if (i[3] < kKeys / 2)
          inputs.mask.set(i, shown);
      });
      for (std::int64_t key = 4 * kBlock; key < kKeys; key += 5 * kBlock)
        spoil(inputs, key, std::min(key + kBlock, kKeys));
      const Call call = inputs.call();
      std::vector<RowId> rows = all_rows(call.q);
      std::erase_if(rows, [](const RowId& row) { return row.row > 10 && row.row % 16 != 0; });
      expect_right(call, run(call), rows);
    }
}

TEST_P(Masks, AMaskMayHoldAnyTrueByte) {
  Rng rng("bytes");
  Inputs inputs({.q_len = 12, .kv_len = 100, .mask = Mask::kBool}, rng);
  std::vector<std::uint8_t> bytes;
  inputs.mask.each([&](const Dims& i) {
    bytes.push_back(inputs.mask.at(i) != 0 ? static_cast<std::uint8_t>(rng.between(1, 255)) : 0);
  });
  Call call = inputs.call();
  const Outputs one = run(call);
  call.options.mask = TensorView(bytes.data(), DType::kBool, inputs.mask.sizes());
  EXPECT_EQ(one.bytes(), run(call).bytes());
}

}  // namespace
}  // namespace keyfold::test

// Panels of keys that a mask hides from every row are not touched: their pages cannot be read here.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "support/case.hpp"
#include "support/environment.hpp"

namespace keyfold::test {
namespace {

/// A copy of a tensor on pages of its own.
class Pages {
 public:
  explicit Pages(const TensorView& from)
      : size_(static_cast<std::size_t>(from.sizes[0] * from.strides[0] * size_of(from.dtype))),
        data_(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    std::memcpy(data_, from.data, size_);
  }
  ~Pages() { munmap(data_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  /// Forbids to read bytes [begin, end).
  void forbid(std::int64_t begin, std::int64_t end) {
    const auto from = static_cast<std::size_t>(begin), to = static_cast<std::size_t>(end);
    ASSERT_EQ(mprotect(static_cast<std::byte*>(data_) + from, to - from, PROT_NONE), 0);
  }
  TensorView as(TensorView view) const {
    view.data = data_;
    return view;
  }

 private:
  std::size_t size_;
  void* data_;
};

TEST(Hidden, PanelsAreNotRead) {
  constexpr std::int64_t kKeys = 2'048, kBlock = 128, kHeadDim = 64;
  if (sysconf(_SC_PAGESIZE) != 4096) GTEST_SKIP() << "pages of another size";
  Rng rng("hidden");
  // A block is hidden from all rows, or seen by a few of them.
  const auto hides = [](std::int64_t row, std::int64_t key) {
    const std::int64_t block = key / kBlock;
    return block % 3 == 1 || (block % 3 == 2 && row % 40 != 3);
  };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const Mask mask : {Mask::kBool, Mask::kAdditive})
      for (const std::int64_t q_len : {4, 24, 150}) {
        Inputs inputs({.dtype = dtype,
                       .num_heads = 3,
                       .q_len = q_len,
                       .kv_len = kKeys,
                       .head_dim = kHeadDim,
                       .mask = mask,
                       .mask_broadcast = {true, q_len > 100, false, false}},
                      rng);
        const float shown = mask == Mask::kBool ? 1 : 0, hidden = mask == Mask::kBool ? 0 : -kInf;
        inputs.mask.each(
            [&](const Dims& i) { inputs.mask.set(i, hides(i[2], i[3]) ? hidden : shown); });
        Call call = inputs.call();
        call.options.run.backend = "cpu";
        const auto result = [&] {
          Tensor out(dtype, call.out_sizes());
          scaled_dot_product_attention(call.q, call.k, call.v, out.mutable_view(), call.options);
          return out.bytes();
        };
        const std::vector<std::byte> expected = result();
        Pages k(call.k), v(call.v);
        const std::int64_t block_bytes = kBlock * kHeadDim * size_of(dtype);
        for (std::int64_t block = 1; block < kKeys / kBlock; block += 3) {
          k.forbid(block * block_bytes, (block + 1) * block_bytes);
          v.forbid(block * block_bytes, (block + 1) * block_bytes);
        }
        call.k = k.as(call.k);
        call.v = v.as(call.v);
        EXPECT_EQ(result(), expected) << "q_len " << q_len;
      }
}

}  // namespace
}  // namespace keyfold::test

// Shapes fit the devices that there are.
#include "vulkan/kernel_shape.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cstddef>

namespace keyfold::vulkan {
namespace {

/// Calls `test` for devices from the smallest that Vulkan allows to the largest known, every dtype
/// and many head sizes.
template <class Test>
void for_all(const Test& test) {
  for (const std::uint32_t subgroup : {4, 8, 16, 32, 64, 128})
    for (const std::uint32_t shared : {16, 32, 48, 64, 227})
      for (const std::uint32_t invocations : {128, 256, 512, 1024})
        for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
          for (const std::int64_t dim : {1, 8, 40, 64, 72, 80, 96, 128, 192, 256, 512, 576}) {
            const ShapeQuery query{.dtype = dtype,
                                   .head_dim = dim,
                                   .value_dim = dim == 192 ? 128 : dim,
                                   .subgroup_size = subgroup,
                                   .max_shared_bytes = shared * 1024,
                                   .max_workgroup_invocations = invocations};
            SCOPED_TRACE(testing::Message()
                         << "subgroup " << subgroup << " shared " << shared << " KiB invocations "
                         << invocations << " dim " << dim);
            test(query);
          }
}

TEST(KernelShape, ScalarKernelsFitEveryDevice) {
  for_all([](const ShapeQuery& query) {
    if (query.head_dim > 256 && query.max_shared_bytes < (32 << 10)) return;  // may throw
    const AttendShape attend = attend_shape(query);
    EXPECT_LE(attend.shared_bytes, query.max_shared_bytes);
    EXPECT_LE(attend.workgroup(), query.max_workgroup_invocations);
    EXPECT_LE(attend.tx, query.subgroup_size);
    EXPECT_EQ(kPrefillSplitLen % attend.keys(), 0U);
    const DecodeShape decode = decode_shape(query);
    EXPECT_LE(decode.shared_bytes, query.max_shared_bytes);
    EXPECT_LE(decode.workgroup(), query.max_workgroup_invocations);
    EXPECT_GT(decode.row_limit, 0U);
    EXPECT_LE(merge_shape(query, true).workgroup(), query.max_workgroup_invocations);
  });
}

TEST(KernelShape, MatrixKernelsFitOrAreNotThere) {
  int found = 0;
  for_all([&](const ShapeQuery& query) {
    for (const std::uint32_t size : {8, 16})
      for (const bool in_registers : {false, true}) {
        const auto shape = matrix_shape(query, size, in_registers);
        if (!shape) continue;
        ++found;
        EXPECT_LE(shape->shared_bytes, query.max_shared_bytes);
        EXPECT_LE(shape->workgroup(), query.max_workgroup_invocations);
        EXPECT_TRUE(std::has_single_bit(shape->workgroup()));  // lanes divide rows evenly
        EXPECT_GE(shape->workgroup(), 8U);
        EXPECT_EQ(kMatrixSplitLen % shape->keys, 0U);
        EXPECT_EQ(shape->keys % size, 0U);
        EXPECT_EQ(shape->rows(), shape->subgroups * shape->blocks * size);
        EXPECT_EQ(shape->constants(0, 1, 0).size(), 11U);
      }
  });
  EXPECT_GT(found, 0);
}

/// A GPU of 32 threads to a subgroup and `shared` KiB of shared memory.
ShapeQuery common_gpu(std::int64_t head_dim, std::int64_t value_dim, std::uint32_t shared = 48) {
  return {.dtype = DType::kBFloat16,
          .head_dim = head_dim,
          .value_dim = value_dim,
          .subgroup_size = 32,
          .max_shared_bytes = shared << 10,
          .max_workgroup_invocations = 1024};
}

TEST(KernelShape, ACommonGpuHasMatricesForCommonHeads) {
  for (const std::int64_t dim : {40, 64, 80, 96, 128, 192, 256}) {
    EXPECT_TRUE(matrix_shape(common_gpu(dim, dim), 16, true)) << dim;
    EXPECT_TRUE(matrix_shape(common_gpu(dim, dim), 16, false)) << dim;
  }
  EXPECT_FALSE(matrix_shape(common_gpu(264, 264), 16, true));
}

/// As it was measured: docs/vulkan_notes.md.
TEST(KernelShape, MatrixKernelsSpendRegistersWhereTheyServe) {
  const auto expect = [](std::int64_t head_dim, std::int64_t value_dim, const MatrixShape& wanted,
                         bool pairs = false) {
    ShapeQuery query = common_gpu(head_dim, value_dim);
    query.pairs = pairs;
    const auto shape = matrix_shape(query, 16, true);
    ASSERT_TRUE(shape);
    SCOPED_TRACE(testing::Message() << "dims " << head_dim << " " << value_dim);
    EXPECT_EQ(shape->subgroups, wanted.subgroups);
    EXPECT_EQ(shape->keys, wanted.keys);
    EXPECT_EQ(shape->blocks, wanted.blocks);
    EXPECT_EQ(shape->held, wanted.held);
    EXPECT_EQ(shape->shared, wanted.shared);
  };
  const MatrixShape two_blocks{.subgroups = 4, .keys = 64, .blocks = 2, .held = 0};
  const MatrixShape in_registers{.subgroups = 8, .keys = 64};
  const MatrixShape in_place{.subgroups = 4, .keys = 32, .held = 5, .shared = 1};
  const MatrixShape of_pairs{.subgroups = 4, .keys = 32, .blocks = 2, .held = 3};
  expect(40, 40, two_blocks);
  expect(64, 64, two_blocks);
  expect(72, 72, in_registers);
  expect(128, 128, in_registers);
  expect(64, 64, two_blocks, true);
  expect(128, 128, of_pairs, true);
  expect(256, 256, in_place, true);
  expect(192, 128, in_place);
  expect(256, 256, in_place);
}

/// Where shared memory is too small for a shape, q stays in registers and tiles shrink.
TEST(KernelShape, MatrixKernelsMakeDoWithLittleSharedMemory) {
  for (const std::int64_t dim : {64, 256}) {
    const auto shape = matrix_shape(common_gpu(dim, dim, 32), 16, false);
    ASSERT_TRUE(shape);
    EXPECT_EQ(shape->blocks, 1U);
    EXPECT_EQ(shape->held, MatrixShape::kAll);
    EXPECT_EQ(shape->shared, 0U);
  }
}

ElementRows rows_by(int (*row)(int lane, int element)) {
  ElementRows rows{};
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 8; ++e) {
      rows[static_cast<std::size_t>(lane)][static_cast<std::size_t>(e)] = row(lane, e);
    }
  }
  return rows;
}

TEST(KernelShape, PairsOfRowsAreFoundWhereTheyAre) {
  EXPECT_EQ(row_pairs(rows_by([](int lane, int e) { return lane / 4 + e / 2 % 2 * 8; })),
            0b11001100U);
  EXPECT_EQ(row_pairs(rows_by([](int lane, int e) { return lane / 4 * 2 + e / 4; })), 0b11110000U);
  // A row to a lane; a column to a lane; lanes of two rows that are not side by side; a row twice.
  EXPECT_EQ(row_pairs(rows_by([](int lane, int) { return lane / 2; })), 0U);
  EXPECT_EQ(row_pairs(rows_by([](int lane, int e) { return lane / 16 * 8 + e; })), 0U);
  EXPECT_EQ(row_pairs(rows_by([](int lane, int e) { return lane % 8 + e / 4 * 8; })), 0U);
  EXPECT_EQ(row_pairs(rows_by([](int lane, int e) { return lane / 8 + e / 4 * 8; })), 0U);
}

}  // namespace
}  // namespace keyfold::vulkan

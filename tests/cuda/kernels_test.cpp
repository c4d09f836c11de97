// Every kernel compiles for every architecture, with its variables in registers. Break a kernel's
// shape (tr = 16) and see it fail.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <regex>
#include <set>
#include <sstream>

#include "cuda/compiler.hpp"
#include "cuda/shapes.hpp"
#include "cuda/tensors.hpp"

namespace keyfold::cuda {
namespace {

struct Dims {
  std::int64_t head_dim, value_dim;
};

/// What decides a kernel's options, beside the dtype and the sizes.
struct Variant {
  std::int64_t q_len = 100;
  std::int64_t heads = 1;
  std::optional<DType> mask = {};
  float softcap = 0;
};

core::Problem problem_of(DType dtype, Dims dims, const Variant& variant) {
  core::Problem problem;
  problem.shape = {.batch = 1,
                   .num_heads = variant.heads,
                   .num_kv_heads = 1,
                   .q_len = variant.q_len,
                   .kv_len = 1000,
                   .head_dim = dims.head_dim,
                   .value_dim = dims.value_dim,
                   .dtype = dtype};
  problem.softcap = variant.softcap;
  static const char kNothing[8] = {};
  if (variant.mask) {
    problem.mask =
        TensorView{kNothing, *variant.mask, {1, 1, variant.q_len, 1000}, {0, 0, 1000, 1}};
  }
  return problem;
}

std::vector<Variant> variants(DType dtype, Dims dims) {
  std::vector<Variant> result{{}, {.mask = DType::kFloat16, .softcap = 30}, {.q_len = 1}};
  if (dims.head_dim != 128) return result;
  // More than few rows: a round of tiles, and more.
  for (const std::int64_t q_len : {2000, 30000}) result.push_back({.q_len = q_len});
  if (dtype == DType::kBFloat16) return result;
  for (const DType mask : {DType::kBool, DType::kFloat32, DType::kBFloat16}) {
    result.push_back({.mask = mask});
    result.push_back({.q_len = 1, .heads = 4, .mask = mask, .softcap = 30});
  }
  for (const std::int64_t heads : {2, 4, 8}) result.push_back({.q_len = 1, .heads = heads});
  result.push_back({.q_len = 8, .heads = 4});
  return result;
}

/// The number before `unit` in ptxas' report; the largest of them.
int reported(const std::string& log, const std::string& unit) {
  const std::regex pattern("([0-9]+) " + unit);
  int most = -1;
  for (std::sregex_iterator it(log.begin(), log.end(), pattern), end; it != end; ++it)
    most = std::max(most, std::stoi((*it)[1]));
  return most;
}

/// Bytes that a kernel may put aside. Where warps have roles (wgmma.cu) those that copy have few
/// registers; careful passes and masks, which few tiles need, put more aside.
int spills_of(const KernelSpec& spec) {
  if (!spec.jobs || spec.entry == "decode_mma") return 0;
  const auto has = [&](const char* option) {
    return std::ranges::find(spec.options, option) != spec.options.end();
  };
  return has("-DKEYFOLD_CAREFUL=0") && has("-DKEYFOLD_FINISHED=0") ? 384 : 3072;
}

/// Shared memory of a block, as the CUDA programming guide has it.
std::uint32_t max_shared_bytes(int capability) {
  if (capability == 80) return 163 << 10;
  return capability == 90 ? 227 << 10 : 99 << 10;
}

/// The kernels that a problem may need on a device.
std::vector<KernelSpec> kernels_of(const core::Problem& problem, const Traits& traits) {
  std::vector<KernelSpec> all;
  for (const std::string& name : kernel_names(traits)) {
    setenv("KEYFOLD_CUDA_KERNEL", name.c_str(), 1);
    const Shapes shapes(problem, traits);
    for (const bool partial : {false, true}) all.push_back(shapes.main(partial));
    if (shapes.prepare()) all.push_back(*shapes.prepare());
    if (shapes.sum_up()) all.push_back(*shapes.sum_up());
    if (shapes.other()) all.push_back(*shapes.other());
    if (shapes.other()) all.push_back(*shapes.other(false, true));
    if (shapes.careful()) all.push_back(*shapes.careful());
    if (shapes.careful())
      all.push_back(shapes.main(false, true)), all.push_back(*shapes.careful(true));
    const gpu::Waves one{.waves = {{.num_groups = 1, .num_indices = problem.group_size()}}};
    if (const auto few = shapes.cluster(one, 1000, true)) all.push_back(few->kernel);
    all.push_back(shapes.merge());
    all.push_back(shapes.fold_partials({.num_splits = 1}));
  }
  for (KernelSpec& spec : TensorKernels::specs(problem.shape.dtype)) all.push_back(std::move(spec));
  unsetenv("KEYFOLD_CUDA_KERNEL");
  return all;
}

class Kernels : public testing::TestWithParam<std::tuple<int, DType>> {};

TEST_P(Kernels, CompileIntoRegisters) {
  KEYFOLD_NEEDS_NVRTC();
  const auto [capability, dtype] = GetParam();
  const std::string target = nvrtc->target(capability);
  ASSERT_TRUE(target.starts_with("sm_")) << target << ": this NVRTC is too old for the test";
  Traits traits;
  traits.capability = capability;
  traits.max_shared_bytes = max_shared_bytes(capability);
  traits.multiprocessors = 132;
  std::set<std::vector<std::string>> seen;
  std::vector<Dims> all{{128, 128}};
  const bool other = dtype == DType::kBFloat16;  // differs from float16 in the loads only
  if (!other || capability == 90) all.insert(all.end(), {{64, 64}, {256, 256}});
  if (!other) all.insert(all.end(), {{40, 40}, {192, 128}, {576, 512}, {1, 1}});
  for (const Dims dims : all) {
    for (const Variant& variant : variants(dtype, dims)) {
      const core::Problem problem = problem_of(dtype, dims, variant);
      for (KernelSpec& spec : kernels_of(problem, traits)) {
        // What takes long is compiled once: of a mask's dtype one instruction depends, and masks in
        // kernels on wgmma are for one size of each shape; `attend` widens all dtypes to float32,
        // and asks nothing of an architecture.
        const bool first = dtype == DType::kFloat32 && capability == 80;
        const bool masks = dims.head_dim == 64 || dims.head_dim == 128 || dims.head_dim == 576;
        const bool other_mask = variant.mask && variant.mask != DType::kFloat16;
        if (spec.jobs && (other_mask || (variant.mask && !masks))) continue;
        if (other_mask && !first) continue;
        if (spec.entry == "attend" && !first && dims.head_dim != 128) continue;
        std::vector<std::string> key = spec.options;
        key.push_back(spec.entry);
        if (!seen.insert(std::move(key)).second) continue;
        std::ostringstream name;
        name << spec.entry;
        for (const std::string& option : spec.options) name << ' ' << option;
        SCOPED_TRACE(name.str());
        spec.options.emplace_back("--ptxas-options=--verbose");
        std::string log;
        const std::vector<std::byte> code = compile(*nvrtc, spec, target, &log);
        EXPECT_FALSE(code.empty());
        const int registers = reported(log, "registers"), most = 65536 / int(spec.threads);
        EXPECT_GT(registers, 0) << log;
        EXPECT_LE(registers, most) << log;
        EXPECT_LE(reported(log, "bytes spill stores"), spills_of(spec)) << log;
        EXPECT_LE(reported(log, "bytes stack frame"), spills_of(spec)) << log;
        EXPECT_EQ(log.find("serialized"), std::string::npos) << log;  // products that wait
        const bool large = spec.jobs || spec.clusters;
        EXPECT_LE(spec.shared_bytes, large ? traits.max_shared_bytes : kMaxSharedBytes);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(For, Kernels,
                         testing::Combine(testing::Values(80, 90, 120),
                                          testing::Values(DType::kFloat32, DType::kFloat16,
                                                          DType::kBFloat16)),
                         [](const auto& kernel) {
                           return "sm_" + std::to_string(std::get<0>(kernel.param)) + "_" +
                                  std::to_string(static_cast<int>(std::get<1>(kernel.param)));
                         });

TEST(Shapes, JobsCoverAllRowsOnce) {
  for (const std::int64_t dim : {64, 128, 256}) {
    core::Problem problem = problem_of(DType::kBFloat16, {dim, dim}, {.q_len = 4000});
    Traits traits;
    traits.capability = 90;
    traits.multiprocessors = 132;
    const Shapes shapes(problem, traits);
    const gpu::Tiling tiling = shapes.tiling();
    const std::int64_t most = tiling.tile_rows / 64;
    bool smaller = false;
    for (std::int64_t groups = 1; groups < 300; groups += 1 + groups / 3) {
      for (std::int64_t indices = 1; indices < 200000; indices += 1 + indices / 2) {
        const Jobs jobs = shapes.jobs_of({.num_groups = groups, .num_indices = indices});
        const std::int64_t rest = jobs.tiles - jobs.small;
        const std::int64_t rows = 64 * (std::int64_t{jobs.small} * jobs.units + rest * most);
        ASSERT_GE(rows, indices) << groups << " groups of " << indices;
        // The last tile has rows.
        ASSERT_LT(rows - 64 * (rest > 0 ? most : jobs.units), indices) << groups << ' ' << indices;
        problem.shape.num_kv_heads = problem.shape.num_heads = groups;
        const gpu::Layout layout{problem, tiling, false};
        ASSERT_LE(4 * groups * jobs.tiles * most, layout.flags(groups, indices));
        smaller = smaller || jobs.small > 0;
      }
    }
    EXPECT_EQ(smaller, most == 3);
  }
}

TEST(Shapes, ValuesOfAMaskHaveSlotsBesideThoseOfAProduct) {
  for (const std::int64_t head : {1, 64, 128, 192, 256}) {
    for (const std::int64_t value : {64, 128, 192, 256}) {
      const ShapeQuery query{DType::kBFloat16, head, value};
      const WgmmaShape bits = *wgmma_shape(query, 4000, true, 16);
      for (const std::uint32_t size : {2, 4}) {
        for (std::uint32_t rows = 1; rows <= bits.rows(); ++rows) {
          const std::optional<WgmmaShape> s = with_biases(query, bits, size, rows);
          if (!s) continue;
          const auto panels = static_cast<std::uint32_t>(head + 63) / 64;
          // A product takes slots for all of its parts before it lets the first go.
          EXPECT_GE(s->slots, std::max(panels / s->part_panels, s->keys / s->part_keys));
          EXPECT_LE(s->slots, bits.slots);
          EXPECT_GE(s->bias_slots, 1u);
          EXPECT_EQ(s->keys * size / 128 % s->bias_parts, 0u);
          EXPECT_LE(s->shared_bytes, max_shared_bytes(90));
          // What bits of results depend on.
          EXPECT_EQ(s->keys, bits.keys);
          EXPECT_EQ(s->split_len(), bits.split_len());
        }
      }
      EXPECT_TRUE(with_biases(query, bits, 4, bits.rows() / 4)) << head << ' ' << value;
    }
  }
}

TEST(Shapes, TwoWarpgroupsChangeNoBit) {
  for (const std::int64_t head : {1, 64, 128, 192, 256}) {
    for (const std::int64_t value : {64, 128, 192, 256}) {
      const ShapeQuery query{DType::kFloat16, head, value};
      for (const std::int64_t rows : {17, 128, 192, 500, 600, 1024, 1025, 2048, 4000}) {
        const WgmmaShape s = *wgmma_shape(query, rows, false, 16);
        const WgmmaShape other = *wgmma_shape(query, rows, true, 16);
        EXPECT_EQ(s.keys, other.keys);
        EXPECT_EQ(s.split_len(), other.split_len());
        const bool fewer_empty = (rows + 127) / 128 * 128 < (rows + 191) / 192 * 192;
        const bool two = rows <= 1024 ? fewer_empty : rows <= std::int64_t{16} * 128;
        EXPECT_EQ(s.warpgroups, value > 128 || two ? 2u : 3u) << rows << ' ' << value;
        // Keys of the next tile and values of this one are full at once.
        const auto panels = static_cast<std::uint32_t>(head + 63) / 64;
        EXPECT_GE(s.slots, panels / s.part_panels + s.keys / s.part_keys);
        EXPECT_LE(s.shared_bytes, max_shared_bytes(90));
      }
    }
  }
}

TEST(Shapes, AClusterHasAllLeavesOfAGroup) {
  for (const std::int64_t dim : {8, 64, 80, 128, 192, 256}) {
    for (const std::int64_t rows : {1, 8, 9, 16}) {
      const ShapeQuery query{DType::kBFloat16, dim, dim};
      const DecodeMmaShape mma = *decode_mma_shape(query, rows, max_shared_bytes(90));
      const auto s = decode_cluster_shape(query, mma, max_shared_bytes(90));
      ASSERT_TRUE(s) << dim << ' ' << rows;
      EXPECT_GE(s->slots, 2u);
      EXPECT_LE(s->resident * (s->shared_bytes(s->leaves) + 1024), 228u << 10);
      for (std::uint32_t leaves = mma.streams; leaves <= 64; leaves *= 2) {
        for (std::uint32_t share = 1; share <= 132; ++share) {
          const auto blocks = s->blocks(leaves, share);
          if (!blocks) continue;
          EXPECT_LE(*blocks, std::min(share, 16u));
          EXPECT_EQ(leaves % *blocks, 0u);
          EXPECT_LE(leaves / *blocks, s->leaves);
        }
      }
      EXPECT_EQ(s->blocks(8, 16), 8u);
      EXPECT_FALSE(s->blocks(64, 16));
    }
  }
}

TEST(Shapes, JobsAreCutWhereTheyAreNoWholeRounds) {
  for (const std::int64_t dim : {64, 128, 256}) {
    core::Problem problem = problem_of(DType::kBFloat16, {dim, dim}, {.q_len = 8192});
    problem.shape.num_kv_heads = problem.shape.num_heads = 16;
    Traits traits;
    traits.capability = 90;
    traits.multiprocessors = 132;
    const Shapes shapes(problem, traits);
    const gpu::Layout layout{problem, shapes.tiling(), false};
    const gpu::Wave wave{.num_groups = 16, .num_indices = 8192};
    const Jobs jobs = shapes.jobs_of(wave, 1000);
    const std::uint32_t all = jobs.groups * jobs.tiles;
    EXPECT_GT(jobs.cut, 132u);  // a block's share is more than one job
    EXPECT_LE(jobs.cut, all);
    EXPECT_EQ((all - jobs.cut) % 132, 0u);
    EXPECT_EQ(jobs.small, 0u);
    EXPECT_EQ(jobs.length, dim == 64 ? 6u : 8u);
    EXPECT_GT(layout.cuts(16, 8192), shapes.cut_flag_bytes());
    EXPECT_EQ(layout.cuts(1, 8192), 0);          // fewer than one round
    EXPECT_EQ(shapes.jobs_of(wave, 0).cut, 0u);  // rows see different keys
  }
}

TEST(Shapes, WhatIsFoundOfAMaskFitsBehindItsBits) {
  for (const std::int64_t dim : {8, 64, 128, 256}) {
    for (const std::int64_t q_len : {20, 150, 8192}) {
      for (const std::int64_t row_stride : {0, 1000}) {
        core::Problem problem =
            problem_of(DType::kBFloat16, {dim, dim}, {.q_len = q_len, .mask = DType::kBool});
        problem.shape.num_kv_heads = problem.shape.num_heads = 16;
        problem.mask->strides[2] = row_stride;
        Traits traits;
        traits.capability = 90;
        traits.multiprocessors = 132;
        const Shapes shapes(problem, traits);
        const gpu::Layout layout{problem, shapes.tiling(), false};
        const std::int64_t splits = layout.prepared_splits(16, q_len);
        const Jobs jobs = shapes.jobs_of({.num_groups = 16, .num_indices = q_len}, 1000);
        EXPECT_EQ(jobs.length, 0u);  // rows may see different keys
        EXPECT_EQ(jobs.cut > 0, q_len == 8192);
        const std::int64_t found = 20 * splits * jobs.groups * jobs.tiles;
        EXPECT_LE(layout.prepared_flags(16, q_len) + found, layout.prepared(16, q_len));
        EXPECT_EQ(layout.prepared_flags(16, q_len) % 16, 0) << "words of 16 bytes";
      }
    }
  }
}

TEST(Kernels, AMistakeIsAnErrorWithTheLog) {
  KEYFOLD_NEEDS_NVRTC();
  try {
    nvrtc->compile({"wrong.cu", "__global__ void f() { wrong }"}, {}, nvrtc->target(80), {});
    FAIL() << "expected an error";
  } catch (const RunError& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("wrong.cu"), std::string::npos) << what;
    EXPECT_NE(what.find("undefined"), std::string::npos) << what;
  }
}

TEST(Kernels, ADeviceNewerThanTheCompilerGetsWhatTheDriverTranslates) {
  KEYFOLD_NEEDS_NVRTC();
  const std::string target = nvrtc->target(999);
  EXPECT_TRUE(target.starts_with("compute_")) << target;
  EXPECT_EQ(nvrtc->target(90), "sm_90a");
}

}  // namespace
}  // namespace keyfold::cuda

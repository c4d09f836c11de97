// Which kernel a problem gets, and what it is compiled for.
#include "cuda/shapes.hpp"

#include <algorithm>

#include "gpu/kernel_options.hpp"

namespace keyfold::cuda {
namespace {

std::string define(const char* name, std::uint32_t value) {
  return std::string("-DKEYFOLD_") + name + "=" + std::to_string(value);
}

std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace

std::vector<std::string> kernel_names(const Traits& traits) {
  std::vector<std::string> names;
  if (traits.capability == 90) names.emplace_back("wgmma");
  if (traits.capability >= 80) names.emplace_back("mma");
  names.emplace_back("scalar");
  return names;
}

std::string selected_kernel(const Traits& traits) {
  return gpu::kernel_by_name("KEYFOLD_CUDA_KERNEL", kernel_names(traits), traits.name);
}

Shapes::Shapes(const core::Problem& problem, const Traits& traits) : problem_(problem) {
  const AttentionShape& shape = problem.shape;
  const ShapeQuery query{shape.dtype, shape.head_dim, shape.value_dim};
  const bool few = shape.q_len <= kFewRows;
  merge_ = merge_shape(query, few);
  if (few) {
    decode_ = decode_shape(query);
    tiling_ = {.split_len = kDecodeSplitLen,
               .tile_rows = decode_.rows(shape.q_len * problem.group_size()),
               .decode = true};
    return;
  }
  const std::string selected = selected_kernel(traits);
  if (selected == "wgmma") {
    wgmma_ = wgmma_shape(query, shape.q_len * problem.group_size());
  }
  if (wgmma_) {
    name_ = "wgmma";
    device_blocks_ = u32(traits.multiprocessors);
    flops_per_second_ = 4e14;
    const bool partial = wgmma_->partial_len != 0;
    merge_ = merge_shape(query, partial);
    tiling_ = {.split_len = wgmma_->split_len(),
               .tile_rows = wgmma_->rows(),
               .decode = partial,
               .folds = !partial,
               .flag_rows = 64};
    return;
  }
  if (selected != "scalar") {
    mma_ = mma_shape(query, problem.mask.has_value(), traits.max_shared_bytes);
  }
  if (mma_) {
    name_ = "mma";
    device_blocks_ = mma_->resident * u32(traits.multiprocessors);
    flops_per_second_ = shape.dtype == DType::kFloat32 ? 2e13 : 1e14;
    tiling_ = {.split_len = mma_->split_len(),
               .tile_rows = mma_->rows(),
               .folds = true,
               .flag_rows = mma_->rows()};
    return;
  }
  attend_ = attend_shape(query);
  tiling_ = {.split_len = kPrefillSplitLen, .tile_rows = attend_.rows()};
}

KernelSpec Shapes::spec(const std::string& name, std::uint32_t threads,
                        std::uint32_t shared_bytes) const {
  const AttentionShape& s = problem_.shape;
  const bool scores = name != "merge";
  const std::uint32_t value_dim = gpu::padded_dim(s.dtype, s.value_dim);
  return {.file = name + ".cu",
          .entry = name,
          .options = {"--std=c++17",
                      // Results must not depend on what a compiler chooses to fuse.
                      "--fmad=false", define("THREADS", threads),
                      define("DTYPE", scores ? static_cast<std::uint32_t>(s.dtype) : 0),
                      define("HEAD_DIM", scores ? gpu::padded_dim(s.dtype, s.head_dim) : value_dim),
                      define("VALUE_DIM", value_dim),
                      define("MASK_TYPE", scores ? gpu::mask_type(problem_) : 0),
                      define("SOFTCAP", scores && problem_.softcap > 0 ? 1 : 0),
                      define("SPLIT_LEN", scores ? u32(tiling_.split_len) : 1)},
          .threads = threads,
          .shared_bytes = shared_bytes};
}

KernelSpec Shapes::folding(const std::string& name, std::uint32_t threads,
                           std::uint32_t shared_bytes, std::uint32_t keys, bool careful) const {
  KernelSpec kernel = spec(name, threads, shared_bytes);
  kernel.options.push_back(define("KEYS", keys));
  kernel.options.push_back(define("FINISHED", gpu::finishes_scores(problem_) ? 1 : 0));
  kernel.options.push_back(define("CAREFUL", careful ? 1 : 0));
  kernel.jobs = true;
  return kernel;
}

KernelSpec Shapes::wgmma(bool careful) const {
  KernelSpec kernel =
      folding("wgmma", wgmma_->threads(), wgmma_->shared_bytes, wgmma_->keys, careful);
  for (std::string& option : std::vector{
           define("WARPGROUPS", wgmma_->warpgroups), define("PART_PANELS", wgmma_->part_panels),
           define("PART_KEYS", wgmma_->part_keys), define("SLOTS", wgmma_->slots),
           define("WEIGHINGS", wgmma_->weighings),
           define("PARTIAL", wgmma_->partial_len != 0 ? 1 : 0)}) {
    kernel.options.push_back(std::move(option));
  }
  kernel.tiles = {.q_rows = 64, .k_rows = wgmma_->keys, .v_rows = wgmma_->part_keys, .columns = 64};
  return kernel;
}

KernelSpec Shapes::mma(bool careful) const {
  const MmaShape& s = *mma_;
  KernelSpec kernel = folding("mma", s.threads(), s.shared_bytes, s.keys, careful);
  for (std::string& option :
       std::vector{define("BLOCKS", s.blocks), define("ROW_WARPS", s.row_warps),
                   define("COLUMN_WARPS", s.column_warps), define("STAGES", s.stages),
                   define("RESIDENT", s.resident), define("SHARED", s.shared_bytes)}) {
    kernel.options.push_back(std::move(option));
  }
  return kernel;
}

std::optional<KernelSpec> Shapes::careful() const {
  if (wgmma_) return wgmma(true);
  if (mma_) return mma(true);
  return std::nullopt;
}

KernelSpec Shapes::main(bool partial) const {
  if (wgmma_) return wgmma(false);
  if (mma_) return mma(false);
  if (tiling_.decode) {
    KernelSpec kernel = spec("decode", decode_.threads(), 0);
    for (std::string& option :
         std::vector{define("WARPS", decode_.warps), define("ROWS", u32(tiling_.tile_rows)),
                     define("HEAD_LANES", decode_.head_lanes),
                     define("VALUE_LANES", decode_.value_lanes)}) {
      kernel.options.push_back(std::move(option));
    }
    return kernel;
  }
  KernelSpec kernel = spec("attend", attend_.threads(), attend_.shared_bytes);
  for (std::string& option : std::vector{
           define("TY", attend_.ty), define("TX", attend_.tx), define("TR", attend_.tr),
           define("TC", attend_.tc), define("GROUPS", attend_.groups),
           define("SLICE_WORDS", attend_.slice_words), define("SLICE_KEYS", attend_.slice_keys),
           define("SHARED", attend_.shared_bytes), define("PARTIAL", partial ? 1 : 0)}) {
    kernel.options.push_back(std::move(option));
  }
  return kernel;
}

Grid Shapes::main_grid(const gpu::Wave& wave, bool partial) const {
  if (tiling_.folds || wgmma_) {
    const std::int64_t jobs = wave.num_groups * (partial ? wave.num_splits : 1) *
                              gpu::ceil_div(wave.num_indices, tiling_.tile_rows);
    return {.x = u32(std::min<std::int64_t>(device_blocks_, jobs))};
  }
  return {u32(gpu::ceil_div(wave.num_indices, tiling_.tile_rows)),
          partial ? u32(wave.num_splits) : 1, u32(wave.num_groups)};
}

KernelSpec Shapes::merge() const {
  KernelSpec kernel = spec("merge", merge_.threads(), 0);
  kernel.options.push_back(define("ROWS", merge_.rows));
  kernel.options.push_back(define("LANES", merge_.lanes));
  kernel.options.push_back(define("AHEAD", merge_.ahead));
  return kernel;
}

Grid Shapes::merge_grid(const gpu::Wave& wave) const {
  return {u32(gpu::ceil_div(wave.num_indices, merge_.rows)), 1, u32(wave.num_groups)};
}

}  // namespace keyfold::cuda

// Which kernel a problem gets, and what it is compiled for.
#include "cuda/shapes.hpp"

#include <cstdlib>

#include "keyfold/error.hpp"

namespace keyfold::cuda {
namespace {

/// kMaskType of kernels/params.cuh.
std::uint32_t mask_type(const core::Problem& problem) {
  if (!problem.mask) return 0;
  switch (problem.mask->dtype) {
    case DType::kBool: return 1;
    case DType::kFloat32: return 2;
    case DType::kFloat16: return 3;
    case DType::kBFloat16: return 4;
  }
  return 0;
}

std::string define(const char* name, std::uint32_t value) {
  return std::string("-DKEYFOLD_") + name + "=" + std::to_string(value);
}

std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace

std::vector<std::string> kernel_names(const Traits&) { return {"scalar"}; }

std::string selected_kernel(const Traits& traits) {
  const std::vector<std::string> names = kernel_names(traits);
  const char* wanted = std::getenv("KEYFOLD_CUDA_KERNEL");
  if (wanted == nullptr) return names.front();
  std::string all;
  for (const std::string& name : names) {
    if (name == wanted) return name;
    all += (all.empty() ? "" : ", ") + name;
  }
  throw InvalidArgument("KEYFOLD_CUDA_KERNEL", "expected one of " + all + " for " + traits.name +
                                                   ", got '" + std::string(wanted) + "'");
}

Shapes::Shapes(const core::Problem& problem, const Traits& traits) : problem_(problem) {
  const AttentionShape& shape = problem.shape;
  const ShapeQuery query{shape.dtype, shape.head_dim, shape.value_dim};
  const bool few = shape.q_len <= kFewRows;
  merge_ = merge_shape(query, few);
  if (few) {
    decode_ = decode_shape(query);
    tiling_ = {kDecodeSplitLen, decode_.rows(shape.q_len * problem.group_size()), true};
    return;
  }
  name_ = selected_kernel(traits);
  attend_ = attend_shape(query);
  tiling_ = {kPrefillSplitLen, attend_.rows(), false};
}

KernelSpec Shapes::spec(const std::string& name, std::uint32_t threads,
                        std::uint32_t shared_bytes) const {
  const AttentionShape& s = problem_.shape;
  const bool scores = name != "merge";
  const std::uint32_t value_dim = padded_dim(s.dtype, s.value_dim);
  return {.file = name + ".cu",
          .entry = name,
          .options = {"--std=c++17",
                      // Results must not depend on what a compiler chooses to fuse.
                      "--fmad=false", define("THREADS", threads),
                      define("DTYPE", scores ? static_cast<std::uint32_t>(s.dtype) : 0),
                      define("HEAD_DIM", scores ? padded_dim(s.dtype, s.head_dim) : value_dim),
                      define("VALUE_DIM", value_dim),
                      define("MASK_TYPE", scores ? mask_type(problem_) : 0),
                      define("SOFTCAP", scores && problem_.softcap > 0 ? 1 : 0),
                      define("SPLIT_LEN", scores ? u32(tiling_.split_len) : 1)},
          .threads = threads,
          .shared_bytes = shared_bytes};
}

KernelSpec Shapes::main(bool partial) const {
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

// Which kernel a problem gets, and what it is compiled for.
#include "cuda/shapes.hpp"

#include <algorithm>
#include <bit>

#include "cuda/tensor_map.hpp"
#include "gpu/cast.hpp"
#include "gpu/kernel_options.hpp"

namespace keyfold::cuda {
namespace {

std::string define(const char* name, std::uint32_t value) {
  return std::string("-DKEYFOLD_") + name + "=" + std::to_string(value);
}

using gpu::u32;

}  // namespace

std::vector<std::string> kernel_names(const Traits& traits) {
  if (traits.capability == 90) return {"decode_mma", "wgmma", "wgmma3", "mma", "scalar"};
  if (traits.capability >= 80) return {"decode_mma", "mma", "scalar"};
  return {"scalar"};
}

std::string selected_kernel(const Traits& traits) {
  return gpu::kernel_by_name("KEYFOLD_CUDA_KERNEL", kernel_names(traits), traits.name);
}

Shapes::Shapes(const core::Problem& problem, const Traits& traits)
    : problem_(problem),
      multiprocessors_(u32(traits.multiprocessors)),
      overlaps_(traits.capability >= 90) {
  const AttentionShape& shape = problem.shape;
  const ShapeQuery query{shape.dtype, shape.head_dim, shape.value_dim};
  const bool few = shape.q_len <= kFewRows;
  merge_ = merge_shape(query, few);
  const std::vector<std::string> names = kernel_names(traits);
  const auto selected = std::ranges::find(names, selected_kernel(traits));
  const auto eligible = [&](const char* name) {
    return std::find(selected, names.end(), name) != names.end();
  };
  const std::int64_t indices = shape.q_len * problem.group_size();
  if (few) {
    if (eligible("decode_mma"))
      decode_mma_ = decode_mma_shape(query, indices, traits.max_shared_bytes);
    if (decode_mma_) {
      if (traits.capability == 90)
        decode_cluster_ = decode_cluster_shape(query, *decode_mma_, traits.max_shared_bytes);
      name_ = "decode_mma";
      rate_ = 3e11;
      device_blocks_ = decode_mma_->resident * multiprocessors_;
      tiling_ = {.split_len = kDecodeMmaSplitLen,
                 .tile_rows = decode_mma_->rows(),
                 .decode = true,
                 .units = kDecodeMmaSplitLen / kDecodeMmaUnitLen};
      return;
    }
    decode_ = decode_shape(query);
    tiling_ = {.split_len = kDecodeSplitLen, .tile_rows = decode_.rows(indices), .decode = true};
    return;
  }
  if (eligible("wgmma")) {
    const std::int64_t groups = std::max<std::int64_t>(1, shape.batch * shape.num_kv_heads);
    wgmma_ = wgmma_shape(query, indices, problem.mask.has_value(), multiprocessors_ / groups);
  }
  if (!wgmma_ && eligible("wgmma3")) wgmma3_ = wgmma3_shape(query);
  device_blocks_ = multiprocessors_;
  if (wgmma_) {
    name_ = "wgmma";
    rate_ = 3e12;
    const bool partial = wgmma_->partial_len != 0;
    merge_ = merge_shape(query, partial);
    tiling_ = {.split_len = wgmma_->split_len(),
               .tile_rows = wgmma_->rows(),
               .decode = partial,
               .folds = !partial,
               .flag_rows = 64};
    if (!partial) {
      tiling_.cut_bytes = wgmma_->cut_bytes(device_blocks_);
      tiling_.uncut_tiles = device_blocks_;
    }
    if (problem.mask) {
      const Dims& strides = problem.mask->strides;
      const std::int64_t heads = strides[1] != 0 ? problem.group_size() : 1;
      const std::int64_t bytes = heads * MaskBits::record_bytes(wgmma_->split_len());
      (strides[2] != 0 ? tiling_.split_row_bytes : tiling_.split_bytes) = bytes;
      tiling_.split_flag_bytes = MaskBits::kSumBytes;
      tiling_.shared = strides[0] == 0 && strides[1] == 0;
      tiling_.prepared_head = MaskBits::kRecordsFrom;
      tiling_.most_prepared = MaskBits::kMostBytes;
      if (mask_has_values() && (strides[1] == 0 || 64 % problem.group_size() == 0)) {
        const MaskBox box = mask_box();
        const std::uint32_t size = u32(size_of(problem.mask->dtype));
        biased_ = with_biases(query, *wgmma_, size, box.rows * box.heads);
      }
    }
    return;
  }
  if (wgmma3_) {
    name_ = "wgmma3";
    rate_ = 1e12;
    const bool apart = indices <= Wgmma3Shape::kFewRows;
    merge_ = merge_shape(query, apart);
    tiling_ = {.split_len = kPrefillSplitLen,
               .tile_rows = wgmma3_->rows(),
               .decode = apart,
               .folds = !apart,
               .split_bytes = std::int64_t{kPrefillSplitLen / wgmma3_->keys} * wgmma3_->tile_bytes,
               .most_prepared = Wgmma3Shape::kMostPrepared};
    return;
  }
  if (eligible("mma")) mma_ = mma_shape(query, problem.mask.has_value(), traits.max_shared_bytes);
  if (mma_) {
    name_ = "mma";
    device_blocks_ = mma_->resident * multiprocessors_;
    rate_ = shape.dtype == DType::kFloat32 ? 3e11 : 2e12;
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

Shapes::MaskBox Shapes::mask_box() const {
  const Dims& strides = problem_.mask->strides;
  const std::uint32_t rows = wgmma_->rows(), heads = u32(problem_.group_size());
  const std::uint32_t apart = strides[1] != 0 ? heads : 1;
  if (strides[2] == 0) return {1, apart};
  const bool whole = 64 % heads == 0;  // tiles begin with a row's first head
  return {whole ? rows / heads : (rows + heads - 2) / heads + 1, apart};
}

KernelSpec Shapes::wgmma(bool careful, bool ended, bool mask_values, bool copies) const {
  const WgmmaShape& s = copies ? *biased_ : *wgmma_;
  const MaskBox box = copies ? mask_box() : MaskBox{};
  KernelSpec kernel = folding("wgmma", s.threads(), s.shared_bytes, s.keys, careful);
  for (std::string& option :
       std::vector{define("WARPGROUPS", s.warpgroups), define("PART_PANELS", s.part_panels),
                   define("PART_KEYS", s.part_keys), define("SLOTS", s.slots),
                   define("MARK_SLOTS", s.mark_slots), define("MASK_VALUES", mask_values ? 1 : 0),
                   define("BIAS_SLOTS", s.bias_slots), define("BIAS_PARTS", s.bias_parts),
                   define("BIAS_ROWS", box.rows * box.heads), define("WEIGHINGS", s.weighings),
                   define("PARTIAL", tiling_.folds ? 0 : 1), define("ENDED", ended ? 1 : 0)}) {
    kernel.options.push_back(std::move(option));
  }
  kernel.overlaps = careful;
  kernel.tiles = {.q_rows = 64, .k_rows = s.keys, .v_rows = s.part_keys, .columns = 64};
  if (copies) {
    kernel.tiles->mask_keys = 128 / u32(size_of(problem_.mask->dtype));
    kernel.tiles->mask_heads = box.heads;
    kernel.tiles->mask_rows = box.rows;
  }
  kernel.ends = true;
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

KernelSpec Shapes::decode_mma() const {
  const DecodeMmaShape& s = *decode_mma_;
  KernelSpec kernel = folding("decode_mma", s.threads(), s.shared_bytes, s.step, false);
  kernel.ends = true;
  for (std::string& option :
       std::vector{define("UNIT_LEN", kDecodeMmaUnitLen), define("STREAMS", s.streams),
                   define("ROW_TEAM", s.row_team), define("COLUMN_TEAM", s.column_team),
                   define("SLOTS", s.slots), define("RESIDENT", s.resident),
                   define("TILE_ROWS", s.tile_rows), define("LEVELS", s.levels),
                   define("SHARED", s.shared_bytes)}) {
    kernel.options.push_back(std::move(option));
  }
  return kernel;
}

KernelSpec Shapes::decode_cluster() const {
  const DecodeClusterShape& s = *decode_cluster_;
  KernelSpec kernel =
      folding("decode_cluster", s.threads(), s.shared_bytes(s.leaves), decode_mma_->step, false);
  for (std::string& option :
       std::vector{define("UNIT_LEN", kDecodeMmaUnitLen), define("STREAMS", decode_mma_->streams),
                   define("ROW_TEAM", 1), define("COLUMN_TEAM", 1), define("SLOTS", s.slots),
                   define("RESIDENT", s.resident), define("LEAVES", s.leaves),
                   define("TILE_ROWS", decode_mma_->tile_rows),
                   define("SHARED", s.shared_bytes(s.leaves))}) {
    kernel.options.push_back(std::move(option));
  }
  kernel.jobs = false;
  kernel.ends = kernel.clusters = true;
  return kernel;
}

std::optional<Shapes::Cluster> Shapes::cluster(const gpu::Waves& waves, std::int64_t keys,
                                               bool ended) const {
  if (!decode_cluster_ || !ended || waves.waves.size() != 1 || keys == 0) return std::nullopt;
  const gpu::Wave& wave = waves.waves.front();
  if (wave.num_indices > decode_mma_->rows()) return std::nullopt;
  const std::uint32_t all =
      std::bit_ceil(u32(gpu::ceil_div(keys, kDecodeMmaUnitLen))) * decode_mma_->streams;
  const std::uint32_t share = multiprocessors_ / u32(wave.num_groups);
  const std::optional<std::uint32_t> blocks = decode_cluster_->blocks(all, share);
  if (!blocks || share == 0) return std::nullopt;
  return Cluster{.kernel = decode_cluster(),
                 .grid = {*blocks, u32(wave.num_groups)},
                 .shared_bytes = decode_cluster_->shared_bytes(all / *blocks)};
}

KernelSpec Shapes::wgmma3(const std::string& name, std::uint32_t threads,
                          std::uint32_t shared_bytes) const {
  KernelSpec kernel = spec(name, threads, shared_bytes);
  for (std::string& option :
       std::vector{define("WARPGROUPS", wgmma3_->warpgroups), define("KEYS", wgmma3_->keys),
                   define("STAGES", wgmma3_->stages), define("PARTIAL", tiling_.folds ? 0 : 1),
                   define("FINISHED", gpu::finishes_scores(problem_) ? 1 : 0)}) {
    kernel.options.push_back(std::move(option));
  }
  kernel.jobs = true;
  return kernel;
}

std::optional<KernelSpec> Shapes::prepare() const {
  if (wgmma3_) return wgmma3("pairs", Wgmma3Shape::kPairsThreads, 0);
  if (!wgmma_ || !problem_.mask) return std::nullopt;
  KernelSpec kernel = spec("mask_bits", MaskBits::kThreads, 0);
  kernel.options.push_back(define("KEYS", wgmma_->keys));
  kernel.jobs = true;
  return kernel;
}

std::optional<KernelSpec> Shapes::sum_up() const {
  if (!wgmma_ || !problem_.mask) return std::nullopt;
  KernelSpec kernel = wgmma(false, false, false);
  kernel.file = "mask_jobs.cu";
  kernel.entry = "mask_jobs";
  kernel.shared_bytes = 0;
  kernel.tiles.reset();
  kernel.ends = false;
  return kernel;
}

Grid Shapes::sum_grid(const Jobs& jobs, const gpu::Wave& wave) const {
  constexpr std::int64_t kMostBlocks = 4096;
  const std::int64_t parts = tiling_.folds ? 1 : wave.num_splits;
  return {u32(std::min(kMostBlocks, std::int64_t{jobs.groups} * jobs.tiles * parts))};
}

Grid Shapes::prepare_grid(const gpu::Wave& wave) const {
  if (wgmma_) {
    // At most: the kernel knows where heads begin.
    const Dims& strides = problem_.mask->strides;
    const std::int64_t heads = problem_.group_size(), kv_heads = problem_.shape.num_kv_heads;
    const std::int64_t planes = strides[1] != 0   ? wave.num_groups * heads
                                : strides[0] != 0 ? gpu::ceil_div(wave.num_groups, kv_heads) + 1
                                                  : 1;
    const std::int64_t rows = strides[2] != 0 ? gpu::ceil_div(wave.num_indices, heads) + 1 : 1;
    const std::int64_t records = planes * rows * wave.num_splits,
                       warps = MaskBits::kThreads / kWarp;
    return {u32(std::min<std::int64_t>(MaskBits::kMostBlocks, gpu::ceil_div(records, warps)))};
  }
  return {u32(wave.num_splits * tiling_.split_len / wgmma3_->keys), u32(wave.num_groups)};
}

std::optional<KernelSpec> Shapes::other(bool ended, bool copies) const {
  if (!mask_has_values()) return std::nullopt;
  return wgmma(false, ended && tiling_.folds, true, copies && biased_);
}

bool Shapes::copies_mask(const gpu::Params& params) const {
  return biased_ && maps_mask(problem_, params);
}

std::optional<KernelSpec> Shapes::careful(bool ended) const {
  if (wgmma_) return wgmma(true, ended && tiling_.folds, mask_has_values());
  if (mma_) return mma(true);
  return std::nullopt;
}

KernelSpec Shapes::main(bool partial, bool ended) const {
  if (wgmma_) return wgmma(false, ended && tiling_.folds, false);
  if (mma_) return mma(false);
  if (decode_mma_) return decode_mma();
  if (wgmma3_) return wgmma3("wgmma3", wgmma3_->threads(), wgmma3_->shared_bytes);
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

std::vector<KernelSpec> Shapes::all() const {
  std::vector<KernelSpec> specs;
  for (const bool ended : {false, true}) {
    for (const bool partial : {false, true}) specs.push_back(main(partial, ended));
    for (std::optional<KernelSpec> spec : {other(ended), other(ended, true), careful(ended)}) {
      if (spec) specs.push_back(*std::move(spec));
    }
  }
  for (std::optional<KernelSpec> spec : {prepare(), sum_up()}) {
    if (spec) specs.push_back(*std::move(spec));
  }
  if (decode_cluster_) specs.push_back(decode_cluster());
  specs.push_back(merge());
  specs.push_back(fold_partials({.num_splits = 1}));
  return specs;
}

Jobs Shapes::jobs_of(const gpu::Wave& wave, std::int64_t keys) const {
  const std::uint32_t groups = u32(wave.num_groups), blocks = device_blocks_;
  Jobs jobs{.groups = groups, .tiles = u32(gpu::ceil_div(wave.num_indices, tiling_.tile_rows))};
  if (!wgmma_ || !tiling_.folds) return jobs;
  const std::uint32_t all = groups * jobs.tiles, rest = all % blocks;
  const bool alike = problem_.rows_alike() && !problem_.mask;
  const bool cuts = rest != 0 || !alike;  // whole rounds of the same length need none
  if (keys > 0 && cuts && all > blocks && blocks <= wgmma_->threads() &&
      keys <= most_cut_keys(groups, jobs.tiles)) {
    // What a last round would leave, and a round more, or two, so that no block waits at a cut.
    const std::uint32_t rounds = 4 * rest < blocks ? 2 : 1;
    jobs.cut = rest + std::min(rounds, all / blocks) * blocks;
    if (alike) jobs.length = u32(gpu::ceil_div(keys, wgmma_->keys));
    return jobs;
  }
  if (problem_.rows_alike()) shrink_last(jobs, wave.num_indices);
  return jobs;
}

// Rows that all take the same time, in warpgroups' shares: rounds of full tiles, then some of tiles
// of one share less, which take about 3/4 of the time. A row's bits know nothing of its tile.
void Shapes::shrink_last(Jobs& jobs, std::int64_t num_indices) const {
  constexpr double kLessTime = 0.77;
  const std::uint32_t groups = jobs.groups, blocks = device_blocks_;
  const std::uint32_t most = wgmma_->warpgroups, less = most - 1;
  const auto rounds_of = [&](std::int64_t tiles) {
    return static_cast<double>(gpu::ceil_div(groups * tiles, blocks));
  };
  if (most < 3) return;
  double best = rounds_of(jobs.tiles);
  const std::uint32_t shares = u32(gpu::ceil_div(num_indices, 64));
  for (std::uint32_t rounds = 1; rounds <= 2; ++rounds) {
    const std::uint32_t small = std::min(rounds * blocks / groups, shares / less);
    const std::uint32_t large = u32(gpu::ceil_div(shares - small * less, most));
    const double time = rounds_of(large) + kLessTime * static_cast<double>(rounds);
    if (small == 0 || time >= best) continue;
    best = time;
    jobs.tiles = small + large;
    jobs.small = small;
    jobs.units = less;
  }
}

// Blocks that share tiles are not in step. Tiles of two warpgroups' rows ask for so many keys that
// those of the groups at work then have to stay in the cache.
std::int64_t Shapes::most_cut_keys(std::int64_t groups, std::int64_t tiles) const {
  constexpr std::int64_t kCached = 52 << 20;
  if (tiling_.cut_bytes == 0) return 0;
  if (wgmma_->warpgroups == 3) return problem_.shape.kv_len;
  const std::int64_t busy = std::min(groups, gpu::ceil_div(device_blocks_, tiles) + 1);
  const DType dtype = problem_.shape.dtype;
  return kCached / (busy * size_of(dtype) *
                    (gpu::padded_dim(dtype, problem_.shape.head_dim) +
                     gpu::padded_dim(dtype, problem_.shape.value_dim)));
}

Grid Shapes::main_grid(const gpu::Wave& wave, const Jobs& jobs, bool partial) const {
  if (wgmma_ || wgmma3_ || mma_ || decode_mma_) {
    const std::int64_t parts = partial ? wave.num_splits * tiling_.units : 1;
    return {.x = u32(std::min<std::int64_t>(device_blocks_, wave.num_groups * jobs.tiles * parts))};
  }
  return {u32(gpu::ceil_div(wave.num_indices, tiling_.tile_rows)),
          partial ? u32(wave.num_splits) : 1, u32(wave.num_groups)};
}

bool Shapes::ends_rows(const Ends& ends) const {
  // Where the end of a row is not a merge, the kernel itself has to know of it.
  return tiling_.decode || (wgmma_ && in_pairs(ends, problem_.shape.dtype));
}

bool Shapes::reads_queries(const TensorRows& q) const {
  if (decode_mma_) return in_words(q, problem_.shape.dtype, problem_.shape.head_dim);
  return wgmma_ && maps_queries(problem_, *wgmma(false, false, false).tiles, q);
}

KernelSpec Shapes::merge() const {
  KernelSpec kernel = spec("merge", merge_.threads(), 0);
  kernel.options.push_back(define("ROWS", merge_.rows));
  kernel.options.push_back(define("LANES", merge_.lanes));
  kernel.options.push_back(define("AHEAD", merge_.ahead));
  kernel.ends = true;
  kernel.overlaps = overlaps_;
  return kernel;
}

Grid Shapes::merge_grid(const gpu::Wave& wave) const {
  return {u32(gpu::ceil_div(wave.num_indices, merge_.rows)), 1, u32(wave.num_groups)};
}

KernelSpec Shapes::fold_partials(const gpu::Wave& wave) const {
  if (!decode_mma_) return merge();
  KernelSpec kernel = spec("decode_merge", kDecodeMergeThreads, 0);
  kernel.options.push_back(define("UNIT_LEN", kDecodeMmaUnitLen));
  kernel.ends = true;
  kernel.overlaps = overlaps_;
  // Eight threads take a split.
  kernel.threads =
      u32(std::min<std::int64_t>(kDecodeMergeThreads, gpu::round_up(8 * wave.num_splits, kWarp)));
  return kernel;
}

Grid Shapes::fold_grid(const gpu::Wave& wave, bool ended) const {
  if (!decode_mma_) return merge_grid(wave);
  // Blocks of the same row read its (m, l), which one of them would write.
  const std::int64_t columns = gpu::padded_dim(problem_.shape.dtype, problem_.shape.value_dim);
  return {u32(wave.num_indices), ended ? u32(gpu::ceil_div(columns, 32)) : 1, u32(wave.num_groups)};
}

}  // namespace keyfold::cuda

// The kernels of a problem on a device. Plug a further kernel in here.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "cuda/ends.hpp"
#include "cuda/kernel.hpp"
#include "cuda/kernel_shape.hpp"
#include "cuda/traits.hpp"
#include "gpu/kernel_options.hpp"
#include "gpu/layout.hpp"
#include "gpu/waves.hpp"

namespace keyfold::cuda {

/// The kernels that a device can run, in the order of choice. Where one cannot do a problem, the
/// next does it.
std::vector<std::string> kernel_names(const Traits& traits);
/// KEYFOLD_CUDA_KERNEL, else the first of them. Throws InvalidArgument for another name.
std::string selected_kernel(const Traits& traits);

/// Blocks of a launch.
struct Grid {
  std::uint32_t x = 1, y = 1, z = 1;
};

class Shapes {
 public:
  /// Throws as selected_kernel().
  Shapes(const core::Problem& problem, const Traits& traits);

  const std::string& name() const { return name_; }
  gpu::Tiling tiling() const { return tiling_; }
  double flops_per_second() const { return rate_ * multiprocessors_; }

  /// The kernel that meets the keys. `partial`: it gives a partial state for each split, rather
  /// than folding into the states itself; decode always does. `ended`: the launch has an Ends with
  /// results, and states begin empty.
  KernelSpec main(bool partial, bool ended = false) const;
  /// All of these, for runs of the problem: tensors on the device may end rows in the kernels.
  std::vector<KernelSpec> all() const;
  /// Its blocks for a wave.
  Grid main_grid(const gpu::Wave& wave, const Jobs& jobs, bool partial) const;
  /// Its jobs, but for the memory. `keys`: that rows see, about the same number each, where tiles
  /// may be cut there; else 0.
  Jobs jobs_of(const gpu::Wave& wave, std::int64_t keys = 0) const;
  /// Bytes at the begin of Jobs::cuts that have to be 0 before the first of its launches.
  std::int64_t cut_flag_bytes() const { return wgmma_ ? wgmma_->flag_bytes(device_blocks_) : 0; }
  /// What has to run in front of main(), and its blocks for a wave: see kernels/pairs.cu and
  /// mask_bits.cu.
  std::optional<KernelSpec> prepare() const;
  Grid prepare_grid(const gpu::Wave& wave) const;
  /// What has to run between both: see kernels/mask_jobs.cu.
  std::optional<KernelSpec> sum_up() const;
  Grid sum_grid(const Jobs& jobs, const gpu::Wave& wave) const;
  /// What runs behind main() and takes its place where the mask is not as main() wants it: see
  /// kernels/wgmma.cu. `copies`: as copies_mask().
  std::optional<KernelSpec> other(bool ended = false, bool copies = false) const;
  /// Whether other() can have the copy engine bring a chunk's mask.
  bool copies_mask(const gpu::Params& params) const;
  /// What has to run behind main(), for the jobs that it has left: see kernels/fold.cuh.
  std::optional<KernelSpec> careful(bool ended = false) const;

  /// Whether kernels can take rows to such an end, or read q in such a place.
  bool ends_rows(const Ends& ends) const;
  bool reads_queries(const TensorRows& q) const;

  /// One launch that takes few keys of a chunk, from empty states, to results: the same bits.
  struct Cluster {
    KernelSpec kernel;
    Grid grid;
    std::uint32_t shared_bytes = 0;
  };
  /// nullopt where it can't, or the device would be busier without it.
  std::optional<Cluster> cluster(const gpu::Waves& waves, std::int64_t keys, bool ended) const;

  KernelSpec merge() const;
  std::int64_t merge_rows() const { return merge_.rows; }
  Grid merge_grid(const gpu::Wave& wave) const;
  /// What folds the partial states that main() gives for a wave: decode_mma.cu has its own.
  KernelSpec fold_partials(const gpu::Wave& wave) const;
  Grid fold_grid(const gpu::Wave& wave, bool ended) const;

 private:
  static constexpr std::int64_t kFewRows = 8;  // that decode takes; q_len alone decides

  /// With what every kernel is compiled for; a merge, which knows neither masks nor scores, for
  /// less.
  KernelSpec spec(const std::string& name, std::uint32_t threads, std::uint32_t shared_bytes) const;

  /// Gives jobs that are not cut smaller tiles at the end.
  void shrink_last(Jobs& jobs, std::int64_t num_indices) const;
  /// Keys up to which jobs are cut.
  std::int64_t most_cut_keys(std::int64_t groups, std::int64_t tiles) const;

  /// With what a kernel of jobs is compiled for besides.
  KernelSpec folding(const std::string& name, std::uint32_t threads, std::uint32_t shared_bytes,
                     std::uint32_t keys, bool careful) const;
  KernelSpec wgmma(bool careful, bool ended, bool mask_values, bool copies = false) const;
  /// Rows of the mask that a tile has, of so many heads each.
  struct MaskBox {
    std::uint32_t rows = 0, heads = 0;
  };
  MaskBox mask_box() const;
  /// Whether scores may have to meet a mask's values, rather than its bits.
  bool mask_has_values() const { return wgmma_ && gpu::mask_type(problem_) > 1; }
  KernelSpec mma(bool careful) const;
  KernelSpec decode_mma() const;
  KernelSpec decode_cluster() const;
  KernelSpec wgmma3(const std::string& name, std::uint32_t threads,
                    std::uint32_t shared_bytes) const;

  const core::Problem& problem_;
  std::string name_ = "scalar";
  gpu::Tiling tiling_;
  std::uint32_t multiprocessors_;
  bool overlaps_;                    ///< launches can
  double rate_ = 8e10;               ///< rough speed of a multiprocessor, flops per second
  std::uint32_t device_blocks_ = 1;  ///< of a kernel with jobs, on the whole device
  std::optional<WgmmaShape> wgmma_;
  std::optional<WgmmaShape> biased_;  ///< the same with room for a mask's values
  std::optional<MmaShape> mma_;
  std::optional<DecodeMmaShape> decode_mma_;
  std::optional<DecodeClusterShape> decode_cluster_;
  std::optional<Wgmma3Shape> wgmma3_;
  AttendShape attend_;
  DecodeShape decode_;
  MergeShape merge_;
};

}  // namespace keyfold::cuda

// The kernels of a chunk as launches, wherever its tensors are.
#pragma once

#include <optional>
#include <vector>

#include "core/backend.hpp"
#include "cuda/device.hpp"
#include "cuda/ends.hpp"
#include "cuda/shapes.hpp"
#include "cuda/tensor_map.hpp"
#include "gpu/layout.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

inline constexpr std::int64_t kMaxGridZ = 65535;

struct Launch {
  /// kernels/params.cuh has its twin.
  struct Arguments {
    gpu::Params params;
    gpu::Batch alike;
    std::uint32_t unused = 0;
  };
  CUfunction function = nullptr;
  Grid grid;
  std::uint32_t threads = 0, shared_bytes = 0;
  bool overlaps = false, clusters = false;
  Arguments arguments;
  std::optional<TensorMaps> maps = {};
  std::optional<Jobs> jobs = {};
  std::optional<Ends> ends = {};
};

/// What a run has in the device's memory.
struct RunMemory {
  gpu::Address q = 0, state = 0;
  gpu::Address partial_o = 0, partial_ml = 0;      ///< 0 where the layout has no partial states
  gpu::Address flags = 0, prepared = 0, cuts = 0;  ///< 0 where the layout has none
};

/// Of one block of rows. All that it refers to outlives it.
class Launcher {
 public:
  Launcher(Device& device, const core::Block& block, const Shapes& shapes,
           const gpu::Layout& layout, const RunMemory& memory)
      : device_(device), block_(block), shapes_(shapes), layout_(layout), memory_(memory) {}

  /// All but the keys and the mask. `batches` may be 0 where batches_alike().
  gpu::Params describe(const ChunkBox& box, gpu::Address batches) const;
  /// `ends`: of the chunk, for kernels that know of ends; nothing by default.
  std::vector<Launch> plan(const ChunkBox& box, const gpu::Params& chunk,
                           const Ends& ends = {}) const;
  /// For the merge of another run's state over the same block.
  std::vector<Launch> plan_merge(gpu::Address other_state, const gpu::Params& whole) const;
  void run(CUstream stream, const std::vector<Launch>& launches) const;

 private:
  Launch launch_of(const KernelSpec& spec, Grid grid, const Jobs& jobs, const gpu::Params& params,
                   const Ends& ends) const;

  Device& device_;
  const core::Block& block_;
  const Shapes& shapes_;
  const gpu::Layout& layout_;
  RunMemory memory_;
};

}  // namespace keyfold::cuda

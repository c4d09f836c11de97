// Launches of kernels/tensors.cu: what brings tensors on the device into a run and its result out.
#pragma once

#include <vector>

#include "core/backend.hpp"
#include "cuda/device.hpp"
#include "cuda/ends.hpp"
#include "gpu/layout.hpp"
#include "gpu/params.hpp"

namespace keyfold::cuda {

/// Which rows: `indices` of each of the groups.
struct RowsPlace {
  std::uint32_t group = 0, kv_heads = 1, heads = 1, indices = 1;
  std::uint64_t count = 0;
};

RowsPlace place_of(const core::Problem& problem, const core::Block& block);

struct Gather {
  RowsPlace place;
  TensorRows from;
  gpu::Address to = 0;
  gpu::Address o = 0, ml = 0;
  std::uint32_t dim = 0, padded_dim = 0, padded_value_dim = 0;
};

struct Finish {
  RowsPlace place;
  gpu::Address o = 0, ml = 0;
  Ends ends;
  std::int64_t padded_value_dim = 0;
};

/// Of one problem, with the device's context current. A kernel is loaded at its first use.
class TensorKernels {
 public:
  TensorKernels(Device& device, const core::Problem& problem)
      : device_(device), problem_(problem) {}

  /// Loads all that a run over tensors on the device needs, so that no launch waits for it.
  void preload() const;
  void gather(CUstream stream, const Gather& what) const;
  void finish(CUstream stream, const Finish& what) const;
  /// The Batch of each batch entry for a chunk, to `to`.
  void batches(CUstream stream, const gpu::Layout& layout, const core::Block& block,
               const ChunkBox& box, gpu::Address to) const;

  /// All kernels that there are for a dtype.
  static std::vector<KernelSpec> specs(DType dtype);

 private:
  void launch(CUstream stream, const char* entry, std::int64_t blocks, const void* params) const;

  Device& device_;
  const core::Problem& problem_;
};

}  // namespace keyfold::cuda

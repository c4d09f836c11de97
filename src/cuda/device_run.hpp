// A run over tensors that are on the GPU already: no byte of them passes through the host, and all
// work goes, in order, to the caller's stream.
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "core/backend.hpp"
#include "cuda/caller_stream.hpp"
#include "cuda/gpu.hpp"
#include "cuda/launcher.hpp"
#include "cuda/shapes.hpp"
#include "cuda/tensors.hpp"
#include "gpu/layout.hpp"

namespace keyfold::cuda {

class DeviceRun : public core::Run {
 public:
  DeviceRun(Gpu& gpu, const core::Problem& problem, const core::Block& block);
  /// Waits only where no result was asked for.
  ~DeviceRun() override;

  /// Scratch of such a run.
  static std::int64_t scratch_bytes(const gpu::Layout& layout, std::int64_t groups,
                                    std::int64_t rows);

  void submit(const core::Chunk& chunk, const core::KeySource& source) override;
  /// While the stream is being captured: an estimate.
  double wait() override;
  void merge(core::Run& other) override;
  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override;

 private:
  /// Keys of a chunk that are launched together.
  struct Piece {
    ChunkBox box;
    gpu::Params params;
    std::vector<Launch> launches;
  };

  std::vector<ChunkBox> boxes_of(const ChunkBox& box, bool in_place) const;
  Piece piece_of(const ChunkBox& box, const core::KeySource& source, const Ends& ends,
                 bool in_place) const;
  /// What the chunk's kernels read and write of the tensors themselves.
  Ends ends_of(const core::Chunk& chunk, bool in_place) const;
  /// Gathers what kernels do not read where it is, and makes the states that they go on from.
  void begin_rows(const Ends& ends);
  gpu::Address ml() const;
  void point_at_mask(const ChunkBox& box, gpu::Params& params) const;
  void gather_keys(const ChunkBox& box, const core::KeySource& source) const;
  std::int64_t groups() const { return block_.group_end - block_.group_begin; }
  std::int64_t rows() const { return block_.row_end - block_.row_begin; }
  template <class Body>
  decltype(auto) guarded(const Body& body);

  Gpu& gpu_;
  const core::Problem& problem_;
  core::Block block_;
  Shapes shapes_;
  gpu::Layout layout_;
  std::shared_ptr<Device> device_;
  std::optional<CallerStream> stream_;
  StreamMemory scratch_, window_;
  RunMemory memory_;
  gpu::Address batches_ = 0;
  std::optional<TensorKernels> tensors_;
  std::optional<Launcher> launcher_;
  std::deque<double> submitted_flops_;
  bool begun_ = false;     ///< begin_rows() has been called
  bool ended_ = false;     ///< the kernels of the sole chunk write the results
  bool finished_ = false;  ///< all that writes results is queued
};

}  // namespace keyfold::cuda

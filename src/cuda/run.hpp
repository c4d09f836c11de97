// A run on a GPU: state, partials and windows in its memory; each chunk one submission.
#pragma once

#include <tbb/task_arena.h>

#include <array>
#include <memory>
#include <optional>

#include "core/backend.hpp"
#include "cuda/gpu.hpp"
#include "cuda/keys.hpp"
#include "cuda/launcher.hpp"
#include "cuda/shapes.hpp"
#include "cuda/stream.hpp"
#include "gpu/chunk.hpp"
#include "gpu/finish.hpp"
#include "gpu/layout.hpp"

namespace keyfold::cuda {

class CudaRun : public core::Run {
 public:
  CudaRun(Gpu& gpu, const core::Problem& problem, const core::Block& block, int num_threads);

  void submit(const core::Chunk& chunk, const core::KeySource& source) override;
  double wait() override;
  void merge(core::Run& other) override;
  void save(const StateView& to) override;
  void load(const StateView& from) override;
  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override;

 private:
  /// What the device holds for the run.
  struct OnDevice {
    OnDevice(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block);
    RunMemory memory() const;

    std::shared_ptr<Device> device;
    BufferLease start;  // q, ml, sinks, as the run begins
    BufferLease q, state, partial_o, partial_ml, flags, prepared, cuts, sinks;
    BufferLease transfer;  // a piece of the state on its way to the host
    Keys keys;
    struct Frame {
      BufferLease batches_upload, batches;
      BufferLease mask_upload, mask;
    };
    std::array<Frame, gpu::kFrames> frames;
    Stream stream;  // last: it waits before the buffers go
  };
  void begin_state();
  void finish_state();
  OnDevice::Frame& next_frame() { return on_->frames[on_->stream.submitted() % gpu::kFrames]; }
  gpu::HostState download();
  std::int64_t states() const { return gpu::states_of(layout_, block_); }
  template <class Body>
  decltype(auto) guarded(const Body& body);

  Gpu& gpu_;
  const core::Problem& problem_;
  core::Block block_;
  Shapes shapes_;
  gpu::Layout layout_;
  tbb::task_arena arena_;
  std::unique_ptr<OnDevice> on_;
  std::optional<Launcher> launcher_;  // once that is there
};

}  // namespace keyfold::cuda

// A run on a GPU: state, partials and windows in its memory; each chunk one submission.
#pragma once

#include <tbb/task_arena.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "core/backend.hpp"
#include "gpu/finish.hpp"
#include "gpu/layout.hpp"
#include "vulkan/gpu.hpp"
#include "vulkan/keys.hpp"
#include "vulkan/shapes.hpp"
#include "vulkan/stream.hpp"

namespace keyfold::vulkan {

class VulkanRun : public core::Run {
 public:
  VulkanRun(Gpu& gpu, const core::Problem& problem, const core::Block& block, int num_threads);

  void submit(const core::Chunk& chunk, const core::KeySource& source) override;
  double wait() override;
  void merge(core::Run& other) override;
  void save(const StateView& to) override;
  void load(const StateView& from) override;
  void checkpoint() override;
  void recover() override;
  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override;

 private:
  /// What a device holds for the run; gone when the device is lost.
  struct OnDevice {
    OnDevice(std::shared_ptr<Device> device, const gpu::Layout& layout, const core::Block& block);

    std::shared_ptr<Device> device;
    BufferLease start;  // q, then ml, as the run begins
    BufferLease q, state, partial_o, partial_ml;
    BufferLease transfer;  // a piece of the state on its way to or from the host
    Keys keys;
    struct Frame {
      BufferLease head_upload, head;  // Params of each dispatch, then Batch of each batch entry
      std::int64_t head_bytes = 0;
      BufferLease mask_upload, mask;
    };
    std::array<Frame, gpu::kFrames> frames;
    Stream stream;  // last: it waits before the buffers go
  };
  using Commands = vk::raii::CommandBuffer;

  void prepare(const std::shared_ptr<Device>& device);
  void begin_state(const Commands& commands);
  void begin_state();
  Params describe(const ChunkBox& box) const;
  std::function<void(const Commands&)> upload_mask(const ChunkBox& box, OnDevice::Frame& frame,
                                                   Params& params) const;
  struct Dispatch {
    vk::Pipeline pipeline;
    std::uint32_t params = 0;  // which of the frame's
    std::uint32_t x = 1, y = 1, z = 1;
  };
  std::vector<Dispatch> plan_dispatches(const ChunkBox& box, std::vector<Params>& params) const;
  void run_dispatches(const Commands& commands, const OnDevice::Frame& frame,
                      const std::vector<Dispatch>& dispatches) const;
  void write_head(OnDevice::Frame& frame, std::vector<Params>& params, const ChunkBox& box) const;
  gpu::HostState download();
  void restore();  ///< the device's state from saved_
  std::int64_t states() const;

  Gpu& gpu_;
  const core::Problem& problem_;
  core::Block block_;
  Shapes shapes_;
  gpu::Layout layout_;
  tbb::task_arena arena_;
  std::unique_ptr<OnDevice> on_;
  bool begun_ = false;                   // whether the device has the queries and the state
  std::optional<gpu::HostState> saved_;  // the last checkpoint
};

}  // namespace keyfold::vulkan

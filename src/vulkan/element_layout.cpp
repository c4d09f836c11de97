// Asking a device for the layout of its accumulators.
#include "vulkan/element_layout.hpp"

#include <cstring>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "vulkan/kernel_shape.hpp"
#include "vulkan/stream.hpp"

namespace keyfold::vulkan {
namespace {

constexpr std::uint32_t kTileLanes = std::tuple_size_v<ElementRows>;
constexpr std::uint32_t kTileElements = 16 * 16 / kTileLanes, kMostElements = 16 * 16;

std::optional<ElementRows> ask(const std::shared_ptr<Device>& device) {
  std::vector<float> told(std::size_t{kTileLanes} * (1 + kMostElements));
  const auto bytes = static_cast<std::int64_t>(told.size() * sizeof(float));
  const vk::Pipeline pipeline = device->pipelines().get(Kernel::kElements, {{0, kTileLanes}});
  const BufferLease written(device, Use::kReadback, bytes);
  Stream stream(device);
  stream.submit([&](const vk::raii::CommandBuffer& commands) {
    commands.bindPipeline(vk::PipelineBindPoint::eCompute, pipeline);
    commands.pushConstants<Address>(device->pipelines().layout(), vk::ShaderStageFlagBits::eCompute,
                                    0, written->address);
    commands.dispatch(1, 1, 1);
  });
  stream.wait();
  std::memcpy(told.data(), written->host, static_cast<std::size_t>(bytes));
  ElementRows rows{};
  for (std::size_t lane = 0; lane < kTileLanes; ++lane) {
    const float* const of_lane = told.data() + lane * (1 + kTileElements);
    if (of_lane[0] != kTileElements) return std::nullopt;
    for (std::size_t e = 0; e < kTileElements; ++e)
      rows[lane][e] = static_cast<int>(of_lane[1 + e]);
  }
  return rows;
}

}  // namespace

std::uint32_t row_pairs(const std::shared_ptr<Device>& device) {
  if (!device->traits().expects_pairs()) return 0;
  Device::Known& known = device->known();
  const std::lock_guard lock(known.mutex);
  if (!known.pairs) {
    const std::optional<ElementRows> rows = ask(device);
    known.pairs = rows ? row_pairs(*rows) : 0;
  }
  return *known.pairs;
}

}  // namespace keyfold::vulkan

// The Vulkan backend's face to the core.
#include "vulkan/backend.hpp"

#include <string>
#include <utility>

#include "vulkan/errors.hpp"
#include "vulkan/gpu.hpp"
#include "vulkan/memory.hpp"
#include "vulkan/run.hpp"

namespace keyfold::vulkan {
namespace {

constexpr std::int64_t kMostKeys = std::int64_t{1}
                                   << 28;  // of a chunk, as kernels count in 32 bits

std::string type_name(vk::PhysicalDeviceType type) {
  switch (type) {
    case vk::PhysicalDeviceType::eDiscreteGpu: return "discrete GPU";
    case vk::PhysicalDeviceType::eIntegratedGpu: return "integrated GPU";
    case vk::PhysicalDeviceType::eVirtualGpu: return "virtual GPU";
    default: return "software GPU";
  }
}

/// What the system is known to do to long jobs of this driver.
std::string watchdog_of(vk::DriverId driver) {
#if defined(_WIN32)
  return "Windows ends a GPU task after 2 s (TDR)";
#elif defined(__APPLE__)
  return "macOS ends a command buffer after about 5 s";
#else
  switch (driver) {
    case vk::DriverId::eMesaRadv:
    case vk::DriverId::eAmdOpenSource:
    case vk::DriverId::eAmdProprietary: return "Linux amdgpu ends a job after 2 s (lockup_timeout)";
    case vk::DriverId::eIntelOpenSourceMESA:
      return "Linux i915 and xe end a job that does not yield";
    case vk::DriverId::eNvidiaProprietary:
      return "the NVIDIA driver ends a job after some seconds where a display is attached";
    default: return "";
  }
#endif
}

/// What the memory of a discrete GPU gives at least, in bytes per second.
constexpr double kLeastBandwidth = 5e10;
/// What a processor of one gives at least, in operations per second, on matrices and on plain
/// lanes: a third of what small GPUs of the first kind that has matrices are calculated to reach.
constexpr double kLeastOnMatrices = 2e10, kLeastOnLanes = 1e10;

/// Decode reads keys and values once for the rows of a tile. Where the driver does not tell how
/// many processors there are, the speed of other kernels is not known before it is measured.
double least_flops_per_second(const core::Problem& problem, const Shapes& shapes,
                              const Traits& traits) {
  if (!shapes.decode()) {
    return traits.processors * (shapes.matrices() ? kLeastOnMatrices : kLeastOnLanes);
  }
  const auto rows =
      static_cast<double>(std::min(shapes.tile_rows(), problem.group_size() * problem.shape.q_len));
  return kLeastBandwidth * 2 * rows / static_cast<double>(size_of(problem.shape.dtype));
}

class VulkanBackend : public core::Backend {
 public:
  VulkanBackend(std::string name, std::shared_ptr<const Instance> instance,
                vk::raii::PhysicalDevice physical)
      : name_(std::move(name)), gpu_(std::move(instance), std::move(physical)) {}

  DeviceInfo device() const override {
    const Traits& t = gpu_.traits();
    return {.backend = name_,
            .name = t.name,
            .kernel = selected_kernel(t),
            .kernels = kernel_names(t),
            .num_threads = 0,
            .memory_bytes = t.memory_bytes,
            .max_head_dim = max_dim_,
            .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
            .type = type_name(t.type),
            .driver = t.driver,
            .watchdog = watchdog_of(t.driver_id),
            .max_shared_bytes = t.max_shared_bytes,
            .subgroup_size = static_cast<int>(t.subgroup_size),
            .decode_as_prefill = false};
  }

  std::string unsupported(const core::Problem& problem) const override {
    if (problem.shape.head_dim <= max_dim_ && problem.shape.value_dim <= max_dim_) return {};
    return "head_dim " + std::to_string(problem.shape.head_dim) + " and value_dim " +
           std::to_string(problem.shape.value_dim) + " exceed " + std::to_string(max_dim_);
  }

  core::KernelInfo kernel(const core::Problem& problem) const override {
    const Shapes shapes(problem, gpu_.traits());
    const bool discrete = gpu_.traits().type == vk::PhysicalDeviceType::eDiscreteGpu;
    const bool software = type_name(gpu_.traits().type) == "software GPU";
    return {.name = shapes.name(),
            .split_len = shapes.split_len(),
            .row_align = std::max<std::int64_t>(1, shapes.tile_rows() / problem.group_size()),
            .max_in_flight = static_cast<int>(gpu::kFrames),
            .first_dispatch_flops = discrete   ? 2e9
                                    : software ? 2e7
                                               : 2e8,
            .least_flops_per_second =
                discrete ? least_flops_per_second(problem, shapes, gpu_.traits()) : 0,
            .flops_per_second = discrete   ? 1e13
                                : software ? 1e10
                                           : 5e11,
            .checkpoint_seconds = 1};
  }

  std::int64_t scratch_bytes(const core::Problem& problem, std::int64_t groups, std::int64_t rows,
                             int) const override {
    return layout(problem).total(groups, rows);
  }

  std::int64_t max_chunk_keys(const core::Problem& problem, const core::Block& block,
                              bool keys_on_device) const override {
    if (keys_on_device) return kMostKeys;
    return layout(problem).max_keys(block.group_end - block.group_begin,
                                    block.row_end - block.row_begin);
  }

  std::shared_ptr<core::DeviceMemory> allocate(std::int64_t bytes) override {
    return std::make_shared<VulkanMemory>(gpu_, bytes);
  }

  std::unique_ptr<core::Run> begin(const core::Problem& problem, const core::Block& block,
                                   int num_threads) override {
    return std::make_unique<VulkanRun>(gpu_, problem, block, num_threads);
  }

 private:
  gpu::Layout layout(const core::Problem& problem) const {
    return {problem, Shapes(problem, gpu_.traits()).tiling(), gpu_.traits().shared_memory};
  }

  std::string name_;
  Gpu gpu_;
  std::int64_t max_dim_ = max_head_dim(gpu_.traits());
};

}  // namespace

std::vector<std::shared_ptr<core::Backend>> make_backends() {
  std::vector<std::shared_ptr<core::Backend>> all;
  try {
    const std::shared_ptr<const Instance> instance = Instance::open();
    if (!instance) return all;
    for (vk::raii::PhysicalDevice& physical : instance->devices()) {
      std::string name = all.empty() ? "vulkan" : "vulkan:" + std::to_string(all.size());
      all.push_back(
          std::make_shared<VulkanBackend>(std::move(name), instance, std::move(physical)));
    }
  } catch (const vk::Error&) {  // a driver that cannot tell what it has
    return all;
  }
  return all;
}

}  // namespace keyfold::vulkan

// Compiling kernels for a device, and the cache of what the driver made of them.
#include "vulkan/pipelines.hpp"

#include <span>
#include <string>

#include "gpu/disk_cache.hpp"
#include "gpu/params.hpp"
#include "vulkan/shaders.hpp"

namespace keyfold::vulkan {
namespace {

namespace fs = std::filesystem;

/// One file per device and driver: another driver's data would only be thrown away.
fs::path cache_file(const vk::raii::PhysicalDevice& physical) {
  const fs::path folder = gpu::cache_folder();
  if (folder.empty()) return {};
  constexpr char kDigits[] = "0123456789abcdef";
  std::string name = "vulkan-";
  for (const std::uint8_t byte : physical.getProperties().pipelineCacheUUID) {
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return folder / (name + ".bin");
}

/// With what an earlier process left. Drivers check the header of what they are given, and start
/// anew when it is not theirs.
vk::raii::PipelineCache open_cache(const vk::raii::Device& device, const fs::path& file) {
  const std::vector<std::byte> data = gpu::read_file(file);
  return {device, vk::PipelineCacheCreateInfo({}, data.size(), data.data())};
}

vk::raii::PipelineLayout make_layout(const vk::raii::Device& device) {
  const vk::PushConstantRange address(vk::ShaderStageFlagBits::eCompute, 0, sizeof(gpu::Address));
  return {device, vk::PipelineLayoutCreateInfo({}, {}, address)};
}

}  // namespace

Pipelines::Pipelines(const Traits& traits, const vk::raii::PhysicalDevice& physical,
                     const vk::raii::Device& device)
    : traits_(traits),
      device_(device),
      file_(cache_file(physical)),
      cache_(open_cache(device, file_)),
      layout_(make_layout(device)) {}

vk::Pipeline Pipelines::get(Kernel kernel, const Constants& constants) {
  const std::lock_guard lock(mutex_);
  auto found = pipelines_.find({kernel, constants});
  if (found == pipelines_.end()) {
    found = pipelines_.emplace(std::pair(kernel, constants), compile(kernel, constants)).first;
    save();
  }
  return *found->second;
}

vk::raii::Pipeline Pipelines::compile(Kernel kernel, const Constants& constants) {
  std::vector<vk::SpecializationMapEntry> entries;
  std::vector<std::uint32_t> values;
  for (const auto& [id, value] : constants) {
    const auto offset = static_cast<std::uint32_t>(values.size() * sizeof value);
    entries.emplace_back(id, offset, sizeof value);
    values.push_back(value);
  }
  const vk::SpecializationInfo specialization(static_cast<std::uint32_t>(entries.size()),
                                              entries.data(), values.size() * sizeof values[0],
                                              values.data());
  const std::span<const std::uint32_t> code = shader(kernel);
  const vk::raii::ShaderModule module(
      device_, vk::ShaderModuleCreateInfo({}, code.size_bytes(), code.data()));
  vk::PipelineShaderStageCreateInfo stage({}, vk::ShaderStageFlagBits::eCompute, *module, "main",
                                          &specialization);
  vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo size;
  size.requiredSubgroupSize = traits_.subgroup_size;
  if (traits_.pins_subgroup_size) {
    stage.flags = vk::PipelineShaderStageCreateFlagBits::eRequireFullSubgroups;
    stage.pNext = &size;
  }
  return {device_, cache_, vk::ComputePipelineCreateInfo({}, stage, *layout_)};
}

/// A cache that can't be written is no error.
void Pipelines::save() const noexcept {
  if (file_.empty()) return;
  try {
    const std::vector<std::uint8_t> data = cache_.getData();
    gpu::replace_file(file_, std::as_bytes(std::span(data)));
  } catch (const std::exception&) {
    return;
  }
}

}  // namespace keyfold::vulkan

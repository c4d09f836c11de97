// Compute pipelines, specialised by constants, with a cache on disk.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <utility>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/traits.hpp"

namespace keyfold::vulkan {

/// The kernels, each of them one shader. kMatrix2 are those of VK_NV_cooperative_matrix2.
enum class Kernel : std::uint8_t {
  kAttend,
  kMatrixFloat16,
  kMatrixBFloat16,
  kMatrix2Float16,
  kMatrix2BFloat16,
  kDecode,
  kMerge,
  kElements,
};

/// A specialization constant: its id and its value.
using Constants = std::vector<std::pair<std::uint32_t, std::uint32_t>>;

class Pipelines {
 public:
  Pipelines(const Traits& traits, const vk::raii::PhysicalDevice& physical,
            const vk::raii::Device& device);

  /// The pipeline of a kernel under these constants; compiled at its first use, which takes
  /// milliseconds to seconds, or read from the disk.
  vk::Pipeline get(Kernel kernel, const Constants& constants);
  vk::PipelineLayout layout() const { return *layout_; }

 private:
  vk::raii::Pipeline compile(Kernel kernel, const Constants& constants);
  void save() const noexcept;

  const Traits& traits_;
  const vk::raii::Device& device_;
  std::filesystem::path file_;  // empty: no cache on disk
  vk::raii::PipelineCache cache_;
  vk::raii::PipelineLayout layout_;
  std::mutex mutex_;
  std::map<std::pair<Kernel, Constants>, vk::raii::Pipeline> pipelines_;
};

}  // namespace keyfold::vulkan

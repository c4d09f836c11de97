// What a GPU says of itself, as far as keyfold asks.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/cooperative_matrix.hpp"

namespace keyfold::vulkan {

struct Traits {
  /// nullopt when the device lacks something that every kernel needs: Vulkan 1.2 with a compute
  /// queue, buffer addresses, timeline semaphores, 64-bit integers and subgroup shuffles.
  static std::optional<Traits> of(const vk::raii::Instance& instance,
                                  const vk::raii::PhysicalDevice& device);

  std::string name;
  std::string driver;  ///< name and version
  vk::PhysicalDeviceType type = vk::PhysicalDeviceType::eOther;
  vk::DriverId driver_id{};
  std::int64_t memory_bytes = 0;  ///< of the largest heap on the device
  std::uint32_t processors = 0;   ///< that run workgroups; 0 where the driver does not tell
  std::uint32_t queue_family = 0;
  std::uint32_t timestamp_bits = 0;  ///< 0: the queue has no timestamps
  double timestamp_seconds = 0;      ///< of one tick
  std::uint32_t subgroup_size = 0;
  bool pins_subgroup_size = false;  ///< a pipeline can ask for this size
  std::uint32_t max_shared_bytes = 0;
  std::uint32_t max_invocations = 0;  ///< of a workgroup
  std::uint32_t max_groups_z = 0;     ///< workgroups of a dispatch along z
  bool portability = false;           ///< a layered driver: VK_KHR_portability_subset
  MatrixTraits matrices;              ///< none where a kernel on them could not run
  /// Whether row_pairs() is likely to find some: shapes are chosen before there is a device to ask.
  bool expects_pairs() const {
    return driver_id == vk::DriverId::eNvidiaProprietary && subgroup_size == 32 && matrices.any();
  }
  bool shared_memory = false;  ///< the host writes the device's own memory
};

}  // namespace keyfold::vulkan

// Asking a GPU.
#include "cuda/traits.hpp"

#include <array>

namespace keyfold::cuda {

Traits Traits::of(const Driver& driver, CUdevice device) {
  std::array<char, 256> name{};
  driver.device_get_name(name.data(), static_cast<int>(name.size()), device);
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    driver.device_get_attribute(&value, which, device);
    return value;
  };
  Traits t;
  t.name = name.data();
  t.capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                 attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  t.multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  // Kilohertz, two transfers a cycle, bits.
  t.bytes_per_second = 2e3 * attribute(CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE) *
                       attribute(CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH) / 8;
  t.max_shared_bytes =
      static_cast<std::uint32_t>(attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN));
  t.time_limit = attribute(CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT) != 0;
  t.integrated = attribute(CU_DEVICE_ATTRIBUTE_INTEGRATED) != 0;
  if (driver.missing().empty()) {
    std::size_t bytes = 0;
    driver.device_total_mem(&bytes, device);
    t.memory_bytes = static_cast<std::int64_t>(bytes);
  }
  return t;
}

}  // namespace keyfold::cuda

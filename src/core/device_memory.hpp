// The table of the process's device buffers: which address belongs to which device's memory.
#pragma once

#include <optional>
#include <string>

#include "core/backend.hpp"

namespace keyfold::core {

/// A position in a live DeviceBuffer.
struct DeviceAddress {
  std::string backend;
  DeviceMemory* memory = nullptr;
  std::int64_t offset = 0;
  std::int64_t size = 0;  ///< of the buffer
};

/// The buffer that `address` lies in (its end included), if any.
std::optional<DeviceAddress> find_device_address(const void* address);

/// Throws InvalidArgument when `address` lies in a device buffer.
void check_on_host(const char* name, const void* address);

/// k and v where they are, in host memory or on one device. Throws InvalidArgument when they are on
/// different sides, or not inside their buffers.
KeySource locate_keys(const TensorView& k, const TensorView& v, std::int64_t first_key);

/// Name of the backend whose device holds the keys; empty for host memory.
std::string backend_of(const KeySource& source);

}  // namespace keyfold::core

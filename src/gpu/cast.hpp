// Lengths, which are 64-bit signed, as the interfaces of devices want them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace keyfold::gpu {

inline std::size_t usize(std::int64_t value) { return static_cast<std::size_t>(value); }
inline std::uint32_t u32(std::int64_t value) { return static_cast<std::uint32_t>(value); }

}  // namespace keyfold::gpu

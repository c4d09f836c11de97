// What the build made of shaders/*.comp.
#include "vulkan/shaders.hpp"

#include "attend.spv.h"
#include "decode.spv.h"
#include "merge.spv.h"
#include "vulkan/pipelines.hpp"

namespace keyfold::vulkan {

std::span<const std::uint32_t> shader(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAttend: return attend_spv;
    case Kernel::kDecode: return decode_spv;
    case Kernel::kMerge: return merge_spv;
  }
  return {};
}

}  // namespace keyfold::vulkan

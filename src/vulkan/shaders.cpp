// What the build made of shaders/*.comp.
#include "vulkan/shaders.hpp"

#include "attend.comp.hpp"
#include "decode.comp.hpp"
#include "merge.comp.hpp"
#include "vulkan/pipelines.hpp"

namespace keyfold::vulkan {

std::span<const std::uint32_t> shader(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAttend: return shaders::attend_comp;
    case Kernel::kDecode: return shaders::decode_comp;
    case Kernel::kMerge: return shaders::merge_comp;
  }
  return {};
}

}  // namespace keyfold::vulkan

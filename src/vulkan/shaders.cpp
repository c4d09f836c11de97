// What the build made of shaders/*.comp, and the SPIR-V that is kept in shaders/spirv.
#include "vulkan/shaders.hpp"

#include "attend.comp.hpp"
#include "decode.comp.hpp"
#include "elements.spv.hpp"
#include "matrix2_bfloat16.spv.hpp"
#include "matrix2_float16.spv.hpp"
#include "matrix_bfloat16.spv.hpp"
#include "matrix_float16.spv.hpp"
#include "merge.comp.hpp"
#include "vulkan/pipelines.hpp"

namespace keyfold::vulkan {

std::span<const std::uint32_t> shader(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAttend: return shaders::attend_comp;
    case Kernel::kMatrixFloat16: return shaders::matrix_float16_spv;
    case Kernel::kMatrixBFloat16: return shaders::matrix_bfloat16_spv;
    case Kernel::kMatrix2Float16: return shaders::matrix2_float16_spv;
    case Kernel::kMatrix2BFloat16: return shaders::matrix2_bfloat16_spv;
    case Kernel::kDecode: return shaders::decode_comp;
    case Kernel::kElements: return shaders::elements_spv;
    case Kernel::kMerge: return shaders::merge_comp;
  }
  return {};
}

}  // namespace keyfold::vulkan

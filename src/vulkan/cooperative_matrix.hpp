// What a device multiplies as matrices: VK_KHR_cooperative_matrix, with VK_KHR_shader_bfloat16 and
// VK_NV_cooperative_matrix2. They are newer than the headers of many distributions, so what is
// needed of them is declared here.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

namespace keyfold::vulkan {

/// A product of size x size matrices with float32 sums; 0: none.
struct MatrixTraits {
  std::uint32_t float16 = 0, bfloat16 = 0;  ///< the preferred sizes at subgroup scope
  bool nv2 = false;  ///< reductions and conversions of VK_NV_cooperative_matrix2

  bool any() const { return float16 != 0 || bfloat16 != 0; }
  /// Extensions that a device needs for them.
  std::vector<const char*> extensions() const;
};

/// `has(name)`: whether the device has an extension.
MatrixTraits matrix_traits(const vk::raii::Instance& instance,
                           const vk::raii::PhysicalDevice& device,
                           const std::function<bool(const char*)>& has);

/// The feature structures of the three extensions, to ask a device for or to turn on.
class MatrixFeatures {
 public:
  MatrixFeatures() = default;
  /// What `traits` names, turned on.
  explicit MatrixFeatures(const MatrixTraits& traits);

  /// The structures of these extensions as a chain that ends with `next`.
  void* chain(bool khr, bool bfloat16, bool nv2, void* next);
  void* chain(const MatrixTraits& traits, void* next) {
    return chain(traits.any(), traits.bfloat16 != 0, traits.nv2, next);
  }

  struct Khr {
    VkStructureType structure = static_cast<VkStructureType>(1000506000);
    void* next = nullptr;
    VkBool32 matrix = 0, robust_access = 0;
  } khr;
  struct BFloat16 {
    VkStructureType structure = static_cast<VkStructureType>(1000141000);
    void* next = nullptr;
    VkBool32 type = 0, dot_product = 0, matrix = 0;
  } bfloat16;
  struct Nv2 {
    VkStructureType structure = static_cast<VkStructureType>(1000593000);
    void* next = nullptr;
    VkBool32 workgroup_scope = 0, flexible_dimensions = 0, reductions = 0, conversions = 0,
             per_element = 0, tensors = 0, block_loads = 0;
  } nv2;
};

}  // namespace keyfold::vulkan

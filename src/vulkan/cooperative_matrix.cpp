// Asking for cooperative matrices.
#include "vulkan/cooperative_matrix.hpp"

namespace keyfold::vulkan {
namespace {

constexpr const char* kKhrName = "VK_KHR_cooperative_matrix";
constexpr const char* kBFloat16Name = "VK_KHR_shader_bfloat16";
constexpr const char* kNv2Name = "VK_NV_cooperative_matrix2";

// VkComponentTypeKHR and VkScopeKHR.
constexpr std::uint32_t kFloat16 = 0, kFloat32 = 1, kBFloat16 = 1000141000, kSubgroupScope = 3;

/// VkCooperativeMatrixPropertiesKHR.
struct Properties {
  VkStructureType structure = static_cast<VkStructureType>(1000506001);
  void* next = nullptr;
  std::uint32_t m = 0, n = 0, k = 0;
  std::uint32_t a = 0, b = 0, c = 0, result = 0;
  VkBool32 saturating = 0;
  std::uint32_t scope = 0;
};
using GetProperties = VkResult(VKAPI_PTR*)(VkPhysicalDevice, std::uint32_t*, Properties*);

std::vector<Properties> properties(const vk::raii::Instance& instance,
                                   const vk::raii::PhysicalDevice& device) {
  const auto get = reinterpret_cast<GetProperties>(
      instance.getProcAddr("vkGetPhysicalDeviceCooperativeMatrixPropertiesKHR"));
  std::uint32_t count = 0;
  if (get == nullptr || get(*device, &count, nullptr) != VK_SUCCESS) return {};
  std::vector<Properties> all(count);
  if (get(*device, &count, all.data()) != VK_SUCCESS) return {};
  return all;
}

/// The largest square product of these elements, of the sizes that the kernels know.
std::uint32_t preferred(const std::vector<Properties>& all, std::uint32_t element) {
  std::uint32_t best = 0;
  for (const Properties& p : all) {
    if (p.a != element || p.b != element || p.c != kFloat32 || p.result != kFloat32) continue;
    if (p.scope != kSubgroupScope || p.m != p.n || p.n != p.k) continue;
    if ((p.m == 8 || p.m == 16) && p.m > best) best = p.m;
  }
  return best;
}

}  // namespace

std::vector<const char*> MatrixTraits::extensions() const {
  std::vector<const char*> names;
  if (any()) names.push_back(kKhrName);
  if (bfloat16 != 0) names.push_back(kBFloat16Name);
  if (nv2) names.push_back(kNv2Name);
  return names;
}

MatrixTraits matrix_traits(const vk::raii::Instance& instance,
                           const vk::raii::PhysicalDevice& device,
                           const std::function<bool(const char*)>& has) {
  if (!has(kKhrName)) return {};
  MatrixFeatures features;
  vk::PhysicalDeviceFeatures2 all;
  all.pNext = features.chain(true, has(kBFloat16Name), has(kNv2Name), nullptr);
  device.getDispatcher()->vkGetPhysicalDeviceFeatures2(
      *device, reinterpret_cast<VkPhysicalDeviceFeatures2*>(&all));
  if (!features.khr.matrix) return {};
  const std::vector<Properties> products = properties(instance, device);
  MatrixTraits t;
  t.float16 = preferred(products, kFloat16);
  if (features.bfloat16.type && features.bfloat16.matrix) {
    t.bfloat16 = preferred(products, kBFloat16);
  }
  t.nv2 = t.any() && features.nv2.reductions && features.nv2.conversions;
  return t;
}

MatrixFeatures::MatrixFeatures(const MatrixTraits& traits) {
  khr.matrix = traits.any();
  bfloat16.type = bfloat16.matrix = traits.bfloat16 != 0;
  nv2.reductions = nv2.conversions = traits.nv2;
}

void* MatrixFeatures::chain(bool with_khr, bool with_bfloat16, bool with_nv2, void* next) {
  const auto add = [&](auto& feature) {
    feature.next = next;
    next = &feature;
  };
  if (with_khr) add(khr);
  if (with_bfloat16) add(bfloat16);
  if (with_nv2) add(nv2);
  return next;
}

}  // namespace keyfold::vulkan

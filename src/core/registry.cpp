// The one file that names the backends.
#include "core/registry.hpp"

#include <algorithm>
#include <mutex>

#include "core/validate.hpp"
#include "cpu/backend.hpp"
#ifdef KEYFOLD_CUDA
#include "cuda/backend.hpp"
#endif
#ifdef KEYFOLD_VULKAN
#include "vulkan/backend.hpp"
#endif

namespace keyfold::core {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::shared_ptr<Backend>> all{cpu::make_backend()};
  std::once_flag gpus;
};

Registry& registry() {
  // Never destroyed: a thread may still compute while the process exits.
  static auto& instance = *new Registry;
  return instance;
}

/// Loads drivers, which takes a while: only when a GPU may be meant.
void register_gpus() {
#ifdef KEYFOLD_CUDA
  for (auto& backend : cuda::make_backends()) register_backend(std::move(backend));
#endif
#ifdef KEYFOLD_VULKAN
  for (auto& backend : vulkan::make_backends()) register_backend(std::move(backend));
#endif
}

std::vector<std::shared_ptr<Backend>> registered() {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  return r.all;
}

}  // namespace

void register_backend(std::shared_ptr<Backend> backend) {
  const std::string name = backend->device().backend;
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  std::erase_if(r.all, [&](const auto& other) { return other->device().backend == name; });
  r.all.push_back(std::move(backend));
}

std::vector<std::shared_ptr<Backend>> backends() {
  std::call_once(registry().gpus, [] { register_gpus(); });
  return registered();
}

std::shared_ptr<Backend> find_backend(const std::string& name) {
  std::string names;
  for (const auto& backend : backends()) {
    const std::string other = backend->device().backend;
    if (other == name) return backend;
    names += (names.empty() ? "" : ", ") + other;
  }
  throw InvalidArgument("backend", "expected one of " + names + ", got '" + name + "'");
}

std::shared_ptr<Backend> select_backend(const Settings& settings, const Problem& problem) {
  std::string reasons, names;
  const auto find = [&](const auto& list) -> std::shared_ptr<Backend> {
    reasons.clear();
    names.clear();
    for (const auto& backend : list) {
      const std::string name = backend->device().backend;
      names += (names.empty() ? "" : ", ") + name;
      if (settings.backend && *settings.backend != name) continue;
      const std::string reason = backend->reaches(problem.device)
                                     ? backend->unsupported(problem)
                                     : "it can't reach " + text(problem.device);
      if (reason.empty()) return backend;
      reasons += (reasons.empty() ? "" : "; ") + name + ": " + reason;
    }
    return nullptr;
  };
  // Drivers are not loaded where none is needed.
  if (auto found = find(registered())) return found;
  if (auto found = find(backends())) return found;
  if (reasons.empty()) {
    throw InvalidArgument(settings.backend_source, "expected one of " + names + ", got '" +
                                                       settings.backend.value_or("") + "'");
  }
  throw RunError(ErrorCode::kUnsupported, "no backend can run this call: " + reasons);
}

}  // namespace keyfold::core

namespace keyfold {

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> result;
  for (const auto& backend : core::backends()) result.push_back(backend->device());
  return result;
}

}  // namespace keyfold

// The one file that names the backends.
#include "core/registry.hpp"

#include <algorithm>
#include <mutex>

#include "cpu/backend.hpp"

namespace keyfold::core {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<std::shared_ptr<Backend>> all{cpu::make_backend()};
};

Registry& registry() {
  // Never destroyed: a thread may still compute while the process exits.
  static auto& instance = *new Registry;
  return instance;
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
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  return r.all;
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
  for (const auto& backend : backends()) {
    const std::string name = backend->device().backend;
    names += (names.empty() ? "" : ", ") + name;
    if (settings.backend && *settings.backend != name) continue;
    const std::string reason = backend->unsupported(problem);
    if (reason.empty()) return backend;
    reasons += (reasons.empty() ? "" : "; ") + name + ": " + reason;
  }
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

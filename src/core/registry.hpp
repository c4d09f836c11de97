// The backends of this build.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/backend.hpp"
#include "core/settings.hpp"

namespace keyfold::core {

/// Adds a backend, by the name its DeviceInfo gives; later ones of the same name win. For tests.
void register_backend(std::shared_ptr<Backend> backend);

/// All backends, the default one first.
std::vector<std::shared_ptr<Backend>> backends();

/// The backend of that name. Throws InvalidArgument that lists them.
std::shared_ptr<Backend> find_backend(const std::string& name);

/// The backend that `settings` asks for, or else the first that can do the problem. Throws
/// InvalidArgument for an unknown name and RunError (unsupported) with every backend's reason.
std::shared_ptr<Backend> select_backend(const Settings& settings, const Problem& problem);

}  // namespace keyfold::core

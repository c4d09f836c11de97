// The C API's options handle, as attention, state and plan read it.
#pragma once

#include <vector>

#include "keyfold/keyfold.h"
#include "keyfold/options.hpp"

struct keyfold_options {
  keyfold::AttentionOptions attention;  ///< all but kv_lens
  std::vector<std::int64_t> kv_lens;
};

namespace keyfold::c_api {

/// The options of a call, which point into the handle; the defaults for NULL.
AttentionOptions options_of(const keyfold_options* options);

}  // namespace keyfold::c_api

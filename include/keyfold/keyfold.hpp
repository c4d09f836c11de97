// keyfold: exact attention over key sequences of any length. This header brings in all of it.
#pragma once

#include "keyfold/attention.hpp"
#include "keyfold/context_parallel.hpp"
#include "keyfold/device_memory.hpp"
#include "keyfold/error.hpp"
#include "keyfold/options.hpp"
#include "keyfold/plan.hpp"
#include "keyfold/source.hpp"
#include "keyfold/state.hpp"
#include "keyfold/tensor.hpp"
#include "keyfold/transport.hpp"

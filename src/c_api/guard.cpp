// Status codes and the thread's last error message.
#include "c_api/guard.hpp"

#include <cstdio>
#include <exception>
#include <new>

namespace keyfold::c_api {
namespace {

// A fixed buffer, so that even running out of memory can be reported.
thread_local char last_error[1024] = "";

keyfold_status record(ErrorCode code, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return static_cast<keyfold_status>(code);
}

}  // namespace

keyfold_status record_current_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return record(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return record(ErrorCode::kOutOfMemory, "out of host memory");
  } catch (const std::exception& error) {
    return record(ErrorCode::kInternal, error.what());
  } catch (...) {
    return record(ErrorCode::kInternal, "an exception that is not a std::exception");
  }
}

}  // namespace keyfold::c_api

extern "C" {

const char* keyfold_last_error(void) { return keyfold::c_api::last_error; }

const char* keyfold_status_name(keyfold_status status) {
  switch (status) {
    case KEYFOLD_OK: return "ok";
    case KEYFOLD_INVALID_ARGUMENT: return "invalid argument";
    case KEYFOLD_UNSUPPORTED: return "unsupported";
    case KEYFOLD_CANCELLED: return "cancelled";
    case KEYFOLD_OUT_OF_MEMORY: return "out of memory";
    case KEYFOLD_DEVICE_FAILURE: return "device failure";
    case KEYFOLD_INTERNAL: return "internal error";
  }
  return "unknown status";
}

const char* keyfold_version(void) { return KEYFOLD_VERSION; }

}  // extern "C"

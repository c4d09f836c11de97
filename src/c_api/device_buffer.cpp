// The C API's memory on a device.
#include "c_api/guard.hpp"
#include "keyfold/device_memory.hpp"
#include "keyfold/keyfold.h"

using keyfold::c_api::create;
using keyfold::c_api::deref;
using keyfold::c_api::guarded;

struct keyfold_device_buffer {
  keyfold::DeviceBuffer buffer;
};

extern "C" {

keyfold_status keyfold_device_buffer_create(const char* backend, int64_t bytes,
                                            keyfold_device_buffer** buffer) {
  return create(buffer, "buffer", [&] {
    return new keyfold_device_buffer{keyfold::DeviceBuffer(&deref(backend, "backend"), bytes)};
  });
}

keyfold_status keyfold_device_buffer_data(const keyfold_device_buffer* buffer, void** data) {
  return guarded([&] { deref(data, "data") = deref(buffer, "buffer").buffer.data(); });
}

keyfold_status keyfold_device_buffer_upload(keyfold_device_buffer* buffer, int64_t offset,
                                            const void* from, int64_t bytes) {
  return guarded([&] { deref(buffer, "buffer").buffer.upload(offset, from, bytes); });
}

keyfold_status keyfold_device_buffer_download(const keyfold_device_buffer* buffer, int64_t offset,
                                              void* to, int64_t bytes) {
  return guarded([&] { deref(buffer, "buffer").buffer.download(offset, to, bytes); });
}

void keyfold_device_buffer_destroy(keyfold_device_buffer* buffer) { delete buffer; }

}  // extern "C"

// Plans and device lists of the C API: C structs that point into the C++ values owned beside them.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "c_api/dlpack.hpp"
#include "c_api/guard.hpp"
#include "c_api/options.hpp"
#include "keyfold/keyfold.h"
#include "keyfold/plan.hpp"

namespace keyfold::c_api {
namespace {

struct OwnedPlan : keyfold_plan {
  explicit OwnedPlan(Plan from) : keyfold_plan{}, source(std::move(from)) {
    rows.reserve(source.chunks.size());
    for (const ChunkBox& box : source.chunks) {
      rows.push_back(
          {box.group_begin, box.group_end, box.row_begin, box.row_end, box.key_begin, box.key_end});
    }
    backend = source.backend.c_str();
    kernel = source.kernel.c_str();
    split_len = source.split_len;
    paced = source.paced;
    budget_ms = source.budget_ms;
    keys_per_chunk = source.keys_per_chunk;
    rows_per_chunk = source.rows_per_chunk;
    rows_per_block = source.rows_per_block;
    num_row_blocks = source.num_row_blocks;
    scratch_bytes = source.scratch_bytes;
    staging_bytes = source.staging_bytes;
    num_chunks = rows.size();
    chunks = rows.data();
  }
  OwnedPlan(const OwnedPlan&) = delete;

  Plan source;
  std::vector<keyfold_chunk> rows;
};

struct OwnedDevice : keyfold_device {
  explicit OwnedDevice(DeviceInfo from) : keyfold_device{}, source(std::move(from)) {
    for (const std::string& each : source.kernels) kernel_names.push_back(each.c_str());
    for (const DType each : source.dtypes) dl_dtypes.push_back(dl_dtype_of(each));
    backend = source.backend.c_str();
    name = source.name.c_str();
    kernel = source.kernel.c_str();
    num_kernels = kernel_names.size();
    kernels = kernel_names.data();
    num_threads = source.num_threads;
    memory_bytes = source.memory_bytes;
    max_head_dim = source.max_head_dim;
    num_dtypes = dl_dtypes.size();
    dtypes = dl_dtypes.data();
    type = source.type.c_str();
    driver = source.driver.c_str();
    watchdog = source.watchdog.c_str();
    max_shared_bytes = source.max_shared_bytes;
    subgroup_size = source.subgroup_size;
  }
  OwnedDevice(const OwnedDevice&) = delete;

  DeviceInfo source;
  std::vector<const char*> kernel_names;
  std::vector<DLDataType> dl_dtypes;
};

struct OwnedDeviceList : keyfold_device_list {
  explicit OwnedDeviceList(std::vector<DeviceInfo> from) : keyfold_device_list{} {
    for (DeviceInfo& each : from) {
      owned.push_back(std::make_unique<OwnedDevice>(std::move(each)));
      pointers.push_back(owned.back().get());
    }
    num_devices = pointers.size();
    devices = pointers.data();
  }
  OwnedDeviceList(const OwnedDeviceList&) = delete;

  std::vector<std::unique_ptr<OwnedDevice>> owned;
  std::vector<const keyfold_device*> pointers;
};

AttentionShape shape_of(const keyfold_shape& shape) {
  if (shape.struct_size < sizeof(keyfold_shape)) {
    throw InvalidArgument(
        "shape", "expected struct_size >= " + std::to_string(sizeof(keyfold_shape)) + ", got " +
                     std::to_string(shape.struct_size));
  }
  return {shape.batch,  shape.num_heads, shape.num_kv_heads, shape.q_len,
          shape.kv_len, shape.head_dim,  shape.value_dim,    dtype_of(shape.dtype, "shape")};
}

}  // namespace
}  // namespace keyfold::c_api

extern "C" {

keyfold_status keyfold_plan_create(const keyfold_shape* shape, const keyfold_options* options,
                                   const keyfold_plan** plan) {
  using namespace keyfold::c_api;
  return create(plan, "plan", [&] {
    return new OwnedPlan(keyfold::plan(shape_of(deref(shape, "shape")), options_of(options)));
  });
}

void keyfold_plan_destroy(const keyfold_plan* plan) {
  delete static_cast<const keyfold::c_api::OwnedPlan*>(plan);
}

keyfold_status keyfold_device_list_create(const keyfold_device_list** list) {
  using namespace keyfold::c_api;
  return create(list, "list", [] { return new OwnedDeviceList(keyfold::devices()); });
}

void keyfold_device_list_destroy(const keyfold_device_list* list) {
  delete static_cast<const keyfold::c_api::OwnedDeviceList*>(list);
}

}  // extern "C"

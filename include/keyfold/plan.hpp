// What a call will do, before it does it; and the devices that can do it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "keyfold/options.hpp"

namespace keyfold {

/// The shape of a call, without its data.
struct AttentionShape {
  std::int64_t batch = 1;         ///< >= 1
  std::int64_t num_heads = 1;     ///< query heads, a multiple of num_kv_heads
  std::int64_t num_kv_heads = 1;  ///< key and value heads, >= 1
  std::int64_t q_len = 1;         ///< query rows, >= 1
  std::int64_t kv_len = 0;        ///< keys, >= 0
  std::int64_t head_dim = 1;      ///< of q and k
  std::int64_t value_dim = 1;     ///< of v and out
  DType dtype = DType::kFloat32;  ///< of q, k, v and out
};

/// One dispatch: groups x query rows x keys. A group is one key/value head of one batch entry
/// together with the query heads that share it; group = batch_index * num_kv_heads + kv_head.
struct ChunkBox {
  std::int64_t group_begin = 0, group_end = 0;
  std::int64_t row_begin = 0, row_end = 0;
  std::int64_t key_begin = 0, key_end = 0;
};

/// What a call will do.
struct Plan {
  std::string backend;              ///< name of the backend
  std::string kernel;               ///< its kernel (instruction set, GPU architecture)
  std::int64_t split_len = 0;       ///< keys per split; chunk boundaries are multiples of it
  bool paced = true;                ///< chunk sizes follow the clock; `chunks` is then an estimate
  double budget_ms = 0;             ///< longest device time of one dispatch
  std::int64_t keys_per_chunk = 0;  ///< most keys in one chunk
  std::int64_t rows_per_chunk = 0;  ///< most query rows in one chunk
  std::int64_t rows_per_block = 0;  ///< query rows whose state is in scratch together
  std::int64_t num_row_blocks = 0;  ///< blocks of groups and rows, one after another
  std::int64_t scratch_bytes = 0;   ///< state and packed keys; does not depend on kv_len
  std::int64_t staging_bytes =
      0;  ///< copy of out (and lse) until the call is complete; 0 with one block
  std::vector<ChunkBox> chunks;  ///< in the order of their dispatch
};

/// One device of one backend.
struct DeviceInfo {
  std::string backend;                ///< name to pass as RunOptions::backend
  std::string name;                   ///< the device's own name
  std::string kernel;                 ///< kernel in use (instruction set, GPU architecture)
  std::vector<std::string> kernels;   ///< kernels that this device could use
  int num_threads = 0;                ///< worker threads (CPU), else 0
  std::int64_t memory_bytes = 0;      ///< memory of the device
  std::int64_t max_head_dim = 0;      ///< largest head_dim and value_dim
  std::vector<DType> dtypes;          ///< dtypes of q, k, v
  std::string type = "cpu";           ///< "cpu", "discrete GPU", "integrated GPU", "virtual GPU" or
                                      ///< "software GPU"
  std::string driver = {};            ///< name and version of the device's driver; empty on the CPU
  std::string watchdog = {};          ///< what ends long work here, as far as is known; or empty
  std::int64_t max_shared_bytes = 0;  ///< memory that a workgroup shares; 0 on the CPU
  int subgroup_size = 0;              ///< lanes that run together; 0 on the CPU
  bool decode_as_prefill = true;  ///< a row's bits are the same in a decode call (few query rows)
                                  ///< as in a prefill call
};

/// The plan of a call of this shape with these options; reads no tensor data but options.kv_lens.
/// A paced plan's chunks are cut for the backend's estimated speed; the run adapts them.
/// Throws what the call itself would throw for the shape and the options.
KEYFOLD_API Plan plan(const AttentionShape& shape, const AttentionOptions& options = {});

/// Makes what a call of this shape with these options needs beside memory, be its tensors on the
/// host or on the device, and keeps it in the cache on disk: on CUDA, the kernels. Takes as long as
/// their compilation; does nothing where the cache has them, on the CPU and on Vulkan. Throws what
/// plan() throws, and RunError where the device can't be opened.
KEYFOLD_API void warm(const AttentionShape& shape, const AttentionOptions& options = {});

/// The devices that can run attention here, the default one first. Does not throw for an absent
/// device; throws InvalidArgument for an environment value that is wrong.
KEYFOLD_API std::vector<DeviceInfo> devices();

}  // namespace keyfold

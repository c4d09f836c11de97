// What a backend does for the core: say what it is, begin a run, run one chunk, finish.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "keyfold/state.hpp"

namespace keyfold::core {

/// The kernel that a backend would use for a problem.
struct KernelInfo {
  std::string name;  ///< instruction set, GPU architecture
  std::int64_t split_len =
      0;  ///< keys per split: a constant of backend, dtype, head_dim and prefill or decode
  std::int64_t row_align = 1;  ///< row cuts inside a chunk are multiples of this many rows
  int max_in_flight = 2;  ///< submissions to keep queued; 1 where submit() does the work itself
  double first_dispatch_flops =
      0;  ///< work of the first dispatch: milliseconds on a slow device of the kind
  /// Speed that even a busy device of the kind keeps, where that is known before it is measured:
  /// the first dispatch may be as long as the budget allows at it.
  double least_flops_per_second = 0;
  double flops_per_second = 0;  ///< rough speed; only plan() uses it
  /// Wall time between checkpoints of a run; 0 where a device cannot be lost, or not be replaced.
  double checkpoint_seconds = 0;
};

/// The device is gone, with all that was in its memory. Thrown by begin() and by every function of
/// a run; where KernelInfo::checkpoint_seconds is not 0, the core then begins anew or recovers.
class DeviceLost : public RunError {
 public:
  explicit DeviceLost(const std::string& message) : RunError(ErrorCode::kDeviceFailure, message) {}
};

/// The rows whose state is in scratch together: groups [group_begin, group_end) x rows [row_begin,
/// row_end).
struct Block {
  std::int64_t group_begin = 0, group_end = 0;
  std::int64_t row_begin = 0, row_end = 0;
};

/// Memory on a backend's device, behind a DeviceBuffer. Both copies lie inside it, have bytes > 0,
/// and are complete when they return; they throw RunError when the device fails, also later, when a
/// new device has taken its place. One is used by one thread at a time, except for download().
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void upload(std::int64_t offset, const void* from, std::int64_t bytes) = 0;
  virtual void download(std::int64_t offset, void* to, std::int64_t bytes) const = 0;
};

/// Where a tensor's first element is in device memory.
struct DevicePlace {
  DeviceMemory* memory = nullptr;  ///< made by this backend's allocate(); null for host memory
  std::int64_t offset = 0;         ///< bytes
};

/// Keys and values in memory: k [batch, num_kv_heads, n, head_dim], v [..., value_dim].
struct KeySource {
  TensorView k;  ///< when k_device has memory, its data is an address that faults, and so is v's
  TensorView v;
  std::int64_t first_key = 0;  ///< absolute position of k's and v's row 0
  DevicePlace k_device{};
  DevicePlace v_device{};

  /// Both are, or neither.
  bool on_device() const { return k_device.memory != nullptr || k.device != Device{}; }
};

/// One dispatch. Its keys begin at a multiple of split_len, lie inside the source, and end at such
/// a multiple, where the sequence ends, or behind the last key that a row of the block sees.
struct Chunk {
  ChunkBox box;
  double flops = 0;   ///< visible work
  bool sole = false;  ///< the block's only one: it has all rows, and all keys that these ever see
};

/// One block's run: scratch and the state (m, l, o) of its rows. Chunks of the same rows arrive in
/// ascending key order and must be folded in that order. Destroying a run waits for what is in
/// flight.
class Run {
 public:
  virtual ~Run() = default;
  /// Queues a chunk. The source's memory stays valid until wait() has returned for it.
  virtual void submit(const Chunk& chunk, const KeySource& source) = 0;
  /// Waits for the oldest unfinished submission and returns its device time in seconds, without
  /// time spent waiting in a queue. Throws RunError when the device failed. Not called for the last
  /// submission of a problem that is not on the host.
  virtual double wait() = 0;
  /// Adds the state of a run over the same block and other keys.
  virtual void merge(Run& other) = 0;
  /// Copies the state of all rows to tensors of the whole call, or from them. Nothing is in flight.
  virtual void save([[maybe_unused]] const StateView& to) { cannot_move(); }
  virtual void load([[maybe_unused]] const StateView& from) { cannot_move(); }
  /// Keeps a copy of the state on the host. Nothing is in flight.
  virtual void checkpoint() {}
  /// After DeviceLost: makes the device anew (unless another run already has), drops what was in
  /// flight and restores the state of the last checkpoint, or else the empty state. May throw
  /// DeviceLost itself.
  virtual void recover() {
    throw RunError(ErrorCode::kDeviceFailure, "this device cannot be replaced");
  }
  /// Normalises the block's rows, sinks included, and writes them to the views of the whole call:
  /// all of them, or nothing when it throws.
  virtual void finish(const MutableTensorView& out,
                      const std::optional<MutableTensorView>& lse) = 0;

 private:
  [[noreturn]] static void cannot_move() {
    throw RunError(ErrorCode::kUnsupported, "the state of this run stays on its device");
  }
};

/// Backends are made once and shared by all threads.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual DeviceInfo device() const = 0;
  /// Whether it can read and write tensors there.
  virtual bool reaches(const Device& where) const { return where == Device{}; }
  /// Throws InvalidArgument that names the tensor, unless its first element can be reached.
  virtual void check_reaches([[maybe_unused]] const char* name,
                             [[maybe_unused]] const TensorView& tensor) const {}
  /// Why this backend can't do the problem and what would work; empty if it can.
  virtual std::string unsupported(const Problem& problem) const = 0;
  virtual KernelInfo kernel(const Problem& problem) const = 0;
  /// Scratch bytes of a run over `groups` x `rows`, never decreasing in either, whatever the keys.
  virtual std::int64_t scratch_bytes(const Problem& problem, std::int64_t groups, std::int64_t rows,
                                     int num_threads) const = 0;
  /// The most keys of a chunk of the block, a multiple of split_len: what the room for keys that
  /// are copied to the device holds, unless they are there already.
  virtual std::int64_t max_chunk_keys([[maybe_unused]] const Problem& problem,
                                      [[maybe_unused]] const Block& block,
                                      [[maybe_unused]] bool keys_on_device) const {
    return kUnknownLength;
  }
  /// Makes what runs of the problem need beside memory, wherever its tensors are.
  virtual void warm([[maybe_unused]] const Problem& problem) {}
  /// Memory on the device for keys and values. Throws RunError: unsupported, or out of memory.
  virtual std::shared_ptr<DeviceMemory> allocate([[maybe_unused]] std::int64_t bytes) {
    throw RunError(ErrorCode::kUnsupported, "backend '" + device().backend +
                                                "' has no memory of its own: it reads k and v "
                                                "where they are");
  }
  /// Begins a run from the empty state. `problem` outlives the run.
  virtual std::unique_ptr<Run> begin(const Problem& problem, const Block& block,
                                     int num_threads) = 0;
};

}  // namespace keyfold::core

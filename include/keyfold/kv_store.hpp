// The keys and values of a conversation in one file that grows, and outlives the process.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>

#include "keyfold/file_source.hpp"

namespace keyfold {

/// What a KvStore is made with.
struct KvStoreOptions {
  /// Keys of one block, a multiple of 512; the keys of a head lie together within it. Default: the
  /// power of two that makes blocks of about 32 MiB, 512 to 65536.
  std::optional<std::int64_t> block_len = {};
  /// Most keys that the file will ever hold: room for its header, about 280 bytes per block, is
  /// taken at once.
  std::int64_t max_keys = std::int64_t{1} << 24;
};

/// What an append has survived when it returns.
enum class Durability {
  kMachine,  ///< the end of the machine: it is on the disk
  kProcess,  ///< the end of the process; the machine's takes at most the last block's appends
};

/// What was found when a store was opened.
struct RecoveryReport {
  bool closed =
      true;  ///< it had been closed, or its writer is at work: nothing was to be recovered
  std::int64_t dropped_keys = 0;   ///< of an append that was not finished, as far as they had come
  std::int64_t dropped_bytes = 0;  ///< what these keys and their values take
};

/// What verify() has read.
struct VerifyReport {
  std::int64_t keys = 0;     ///< all that are committed
  std::int64_t records = 0;  ///< checksums: one for each append and block that it reaches into
  std::int64_t bytes = 0;    ///< keys and values
};

/// How to follow a store that another thread or process appends to.
struct FollowOptions {
  /// End behind this many keys. Default: when the writer closes the store.
  std::optional<std::int64_t> until = {};
  /// Longest wait for the next key, in seconds; > 0. Default: any time.
  std::optional<double> timeout_s = {};
  /// Ends the wait with Cancelled.
  std::stop_token stop_token = {};
  /// Called every few milliseconds during a wait. What it throws ends the wait.
  std::function<void()> waiting = {};
  SourceOptions read = {};  ///< how to read
};

/// Append-only keys and values in one file (docs/keys_on_disk.md has its format).
///
/// An append is there with all its keys or not at all: for readers, also in other processes, and
/// after the end of the process at any point. An append that was not finished is dropped when the
/// store is opened next, and recovery() says so. Every append has a checksum; opening checks those
/// of the last block, if the store was not closed, and verify() all. Opening takes milliseconds
/// whatever the size. A closed store is a safetensors file, with tensors k.0, v.0, k.1, v.1, ...
/// [batch, num_kv_heads, block_len, dim]; the last ones are filled up with zeros.
///
/// One writer at a time, any number of readers beside it. An object is used by one thread at a
/// time; sources made from it are independent of it. Reading maps the file; see open_source() for
/// what happens when it is truncated meanwhile.
class KEYFOLD_API KvStore {
 public:
  /// Makes a new file, for appending. Throws IoError when the file is there or can't be written,
  /// InvalidArgument for a wrong shape or option.
  static KvStore create(const std::string& path, const KeyValueShape& shape,
                        const KvStoreOptions& options = {},
                        Durability durability = Durability::kMachine);
  /// Opens for appending; drops what was not finished. Throws IoError when another writer has the
  /// store, or it can't be read; InvalidArgument, naming the position, when it is damaged.
  static KvStore append_to(const std::string& path, Durability durability = Durability::kMachine);
  /// Opens for reading, changes nothing. Throws as append_to().
  static KvStore open(const std::string& path);

  ~KvStore();  ///< closes; a failure to do so is found when it is opened next
  KvStore(KvStore&&) noexcept;
  KvStore& operator=(KvStore&&) noexcept;

  const std::string& path() const;
  const KeyValueShape& shape() const;
  std::int64_t block_len() const;
  std::int64_t max_keys() const;
  /// Keys committed by now; those of another writer too.
  std::int64_t size() const;
  const RecoveryReport& recovery() const;

  /// Appends k [batch, num_kv_heads, n, head_dim] and v [..., value_dim], n >= 0, in host memory.
  /// Takes up to 2 * batch * num_kv_heads writes, and with Durability::kMachine two waits for the
  /// disk. Throws InvalidArgument or IoError (a full disk, say); the store is then as it was, and
  /// appending may go on, except that after a failed wait for the disk it must be opened anew.
  void append(const TensorView& k, const TensorView& v);

  /// The keys that are there now, as a source.
  std::unique_ptr<KeyValueSource> source(const SourceOptions& options = {}) const;
  /// All keys, those that are still to come too.
  std::unique_ptr<KeyValueSource> follow(const FollowOptions& options = {}) const;

  /// Reads everything and compares all checksums. Throws InvalidArgument that names the first
  /// position where one does not fit, with what was expected and what came.
  VerifyReport verify() const;

  /// Writes everything to disk and makes the file a safetensors file. Nothing can be appended any
  /// more. Does nothing where nothing was to be appended.
  void close();

 private:
  class Impl;
  explicit KvStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace keyfold

// The file of a KvStore, byte for byte; docs/keys_on_disk.md specifies it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "keyfold/kv_store.hpp"
#include "store/window.hpp"

namespace keyfold::store {

inline constexpr std::int64_t kRecordBytes = 32;
inline constexpr std::int64_t kPageBytes = 4096;  // of the two that stand before the blocks

/// Where everything is: fixed when the file is made.
struct Layout {
  KeyValueShape shape;
  std::int64_t block_len = 0;
  std::int64_t max_blocks = 0;
  std::int64_t header_bytes = 0;  ///< the safetensors header with its length, padded
  std::uint64_t id = 0;           ///< random: records of another file do not count

  std::int64_t key_bytes() const { return row_bytes(shape.head_dim) + row_bytes(shape.value_dim); }
  std::int64_t k_bytes() const { return block_len * row_bytes(shape.head_dim); }
  std::int64_t v_bytes() const { return block_len * row_bytes(shape.value_dim); }
  std::int64_t log_bytes() const { return block_len * kRecordBytes; }
  std::int64_t block_bytes() const { return k_bytes() + v_bytes() + log_bytes(); }
  std::int64_t superblock_begin() const { return header_bytes; }
  std::int64_t mark_begin() const { return header_bytes + kPageBytes; }
  std::int64_t block_begin(std::int64_t block) const {
    return header_bytes + 2 * kPageBytes + block * block_bytes();
  }
  std::int64_t k_begin(std::int64_t block) const { return block_begin(block); }
  std::int64_t v_begin(std::int64_t block) const { return block_begin(block) + k_bytes(); }
  std::int64_t record_begin(std::int64_t block, std::int64_t slot) const {
    return v_begin(block) + v_bytes() + slot * kRecordBytes;
  }
  std::int64_t max_keys() const { return max_blocks * block_len; }

  FileTensor k(const std::shared_ptr<const File>& file, std::int64_t block) const {
    return tensor(file, k_begin(block), shape.head_dim);
  }
  FileTensor v(const std::shared_ptr<const File>& file, std::int64_t block) const {
    return tensor(file, v_begin(block), shape.value_dim);
  }

 private:
  std::int64_t row_bytes(std::int64_t dim) const {
    return shape.batch * shape.num_kv_heads * dim * size_of(shape.dtype);
  }
  FileTensor tensor(const std::shared_ptr<const File>& file, std::int64_t begin,
                    std::int64_t dim) const {
    const Dims sizes{shape.batch, shape.num_kv_heads, block_len, dim};
    return {file, begin, shape.dtype, sizes, dense_strides(sizes)};
  }
};

/// Checks the shape and the options, and chooses the rest. Throws InvalidArgument.
Layout make_layout(const KeyValueShape& shape, const KvStoreOptions& options);

/// The page that says what the file is.
std::array<std::byte, kPageBytes> superblock_of(const Layout& layout);
/// Reads it. Throws InvalidArgument, naming the file, when this is no store, or it is damaged.
Layout read_layout(const File& file);

/// The safetensors header of a store with this many blocks, `header_bytes` long. Of one that is
/// open, it lists no tensors, so that other readers refuse it.
std::string header_text(const Layout& layout, std::optional<std::int64_t> keys);

/// One entry of a block's log, or the mark in the page behind the superblock.
struct Record {
  enum class Kind : std::uint32_t {
    kNone = 0,       ///< a slot that was never written
    kBegun = 1,      ///< an append has begun: `checksum` is the number of keys that are to come
    kPart = 2,       ///< `count` keys are here, the append goes on in the next block
    kCommitted = 3,  ///< `count` keys are here, the append is complete
    kSynced = 4,     ///< the same, and its data were on the disk before this record
    kOpen = 5,       ///< mark: being appended to; it has at least `first` keys
    kClosed = 6,     ///< mark: closed with `first` keys
  };
  Kind kind = Kind::kNone;
  std::uint64_t count = 0;     ///< keys, less than 2^32
  std::uint64_t first = 0;     ///< position of the first of them
  std::uint64_t checksum = 0;  ///< of the keys and values that are here; see checksum_of()

  bool is_data() const {
    return kind == Kind::kPart || kind == Kind::kCommitted || kind == Kind::kSynced;
  }
  bool ends_append() const { return kind == Kind::kCommitted || kind == Kind::kSynced; }
};

using RecordBytes = std::array<std::byte, kRecordBytes>;
RecordBytes to_bytes(const Record& record, const Layout& layout);
/// kNone for a slot of zeros; nullopt where the record's own checksum does not fit.
std::optional<Record> from_bytes(std::span<const std::byte, kRecordBytes> bytes,
                                 const Layout& layout);

/// Checksum of keys [begin, end) of a block: the rows of k, head by head, then those of v. The
/// views are the block's, dense within a row.
std::uint64_t checksum_of(const TensorView& k, const TensorView& v, std::int64_t begin,
                          std::int64_t end);

/// The same for rows that come one after another.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;
  void add(std::span<const std::byte> bytes);
  std::uint64_t value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace keyfold::store

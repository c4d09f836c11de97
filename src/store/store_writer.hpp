// Appends to a store's file.
#pragma once

#include <memory>
#include <vector>

#include "store/log.hpp"

namespace keyfold::store {

class StoreWriter {
 public:
  /// Goes on behind `end`, and cuts off blocks behind it. `file` is open for writing, and locked.
  StoreWriter(std::shared_ptr<File> file, const Layout& layout, const LogEnd& end,
              Durability durability);

  const Position& end() const { return end_; }
  /// Of views that have been checked. Strong guarantee, except for failed(). Throws IoError.
  void append(const TensorView& k, const TensorView& v);
  /// Whether a wait for the disk has failed, after which nobody knows what it has.
  bool failed() const { return failed_; }
  void close();

 private:
  void clear_log();
  void add_block(std::int64_t block);
  std::uint64_t write_data(const TensorView& k, const TensorView& v, std::int64_t from,
                           std::int64_t block, std::int64_t at, std::int64_t count);
  void write_rows(Checksum& checksum, const TensorView& t, std::int64_t from, std::int64_t begin,
                  std::int64_t at, std::int64_t count);
  void write_record(std::int64_t block, std::int64_t slot, const Record& record);
  void write_mark(Record::Kind kind);
  void write_header(std::optional<std::int64_t> keys);
  void sync();

  std::shared_ptr<File> file_;
  Layout layout_;
  Position end_;
  std::int64_t num_blocks_ = 0;
  Durability durability_;
  bool failed_ = false;
  std::vector<std::byte> gathered_;
};

/// Makes the file of an empty store, whole or not at all, and opens it for writing.
std::shared_ptr<File> make_store_file(const std::string& path, const Layout& layout,
                                      Durability durability);

/// Takes the one writer's place. Throws IoError when another has it.
void lock_writer(const File& file);
void unlock_writer(const File& file);
/// Whether another file descriptor than this has the writer's place.
bool has_writer(const File& file);

}  // namespace keyfold::store

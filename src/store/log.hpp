// Reads the records of a store's blocks: how far it goes, and whether it is as it should be.
#pragma once

#include <memory>
#include <vector>

#include "store/format.hpp"

namespace keyfold::store {

/// A place in the logs.
struct Position {
  std::int64_t block = 0;
  std::int64_t slot = 0;  ///< of the next record in it
  std::int64_t keys = 0;  ///< that the records before this place hold
  /// The record here, when its data did not fit: a writer will replace it.
  std::optional<RecordBytes> refused = {};
};

/// What the logs hold.
struct LogEnd {
  Position committed;             ///< behind the last append that is complete
  std::int64_t dropped_keys = 0;  ///< of an append behind it that is not
  bool torn = false;              ///< something is written behind it
};

class LogReader {
 public:
  LogReader(std::shared_ptr<const File> file, const Layout& layout)
      : file_(std::move(file)), layout_(layout) {}

  /// Blocks that the file has. Throws InvalidArgument when it ends inside one.
  std::int64_t num_blocks() const;
  /// The end of all that is committed, from the last block backwards. With `check_data` the last
  /// block's data are compared with their checksums: what was not known to be on disk ends there,
  /// and what was is an InvalidArgument, as is a damaged record in the middle.
  LogEnd find_end(bool check_data) const;
  /// Goes on from a place between appends, over all that has been committed since.
  Position advance(Position from) const;
  /// The mark; nullopt where it is damaged.
  std::optional<Record> mark() const;

  /// All records of a block that hold data, from its first slot on; a full block has block_len keys
  /// in them. `stop` receives the record behind them, nullopt for one whose checksum does not fit.
  std::vector<Record> records(std::int64_t block, std::optional<Record>& stop) const;
  /// Compares the data of records of one block with their checksums.
  class DataChecker {
   public:
    DataChecker(const LogReader& log, std::int64_t block);
    /// The error, or "".
    std::string check(const Record& record) const;

   private:
    const Layout& layout_;
    std::int64_t block_;
    Window k_, v_;
  };

 private:
  std::shared_ptr<const File> file_;
  Layout layout_;
};

}  // namespace keyfold::store

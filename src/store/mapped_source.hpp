// A source over mapped files: pieces are mapped and read ahead of their use.
#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "keyfold/file_source.hpp"
#include "store/prefetcher.hpp"
#include "store/window.hpp"

namespace keyfold::store {

/// Throws InvalidArgument for a field out of range.
void check_options(const SourceOptions& options);

class MappedSource : public KeyValueSource {
 public:
  MappedSource(const KeyValueShape& shape, const SourceOptions& options);
  ~MappedSource() override;

  KeyValueShape shape() const final { return shape_; }
  void seek(std::int64_t begin, std::int64_t end) final;
  KeyValuePiece next() final;
  void release() final;

 protected:
  /// Keys that lie in one tensor of each kind.
  struct Extent {
    FileTensor k, v;
    std::int64_t first = 0;  ///< absolute position of their key 0
    std::int64_t end = 0;    ///< behind the last key that may be read now
  };
  /// The extent that holds `key`; nullopt when the key is not there (yet). With `wait` it may wait
  /// until it is.
  virtual std::optional<Extent> extent(std::int64_t key, bool wait) = 0;

 private:
  struct Piece {
    Piece(const Extent& extent, std::int64_t begin, std::int64_t end)
        : k(extent.k, begin - extent.first, end - extent.first),
          v(extent.v, begin - extent.first, end - extent.first) {}
    Window k, v;
    Prefetcher::Batch batch;
  };

  void clear();
  /// Maps pieces until enough are ahead; waits for the first one only.
  void fill();

  KeyValueShape shape_;
  std::int64_t piece_keys_;
  bool in_use_ = false;  // the first piece has been given
  std::int64_t next_ = 0, end_ = 0;
  std::deque<std::unique_ptr<Piece>> pieces_;
  Prefetcher prefetcher_;
};

}  // namespace keyfold::store

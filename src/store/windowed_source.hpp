// A source over files: pieces are mapped, or read ahead of their use.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>

#include "keyfold/file_source.hpp"
#include "store/prefetcher.hpp"
#include "store/window.hpp"

namespace keyfold::store {

/// Throws InvalidArgument for a field out of range.
void check_options(const SourceOptions& options);

class WindowedSource : public KeyValueSource {
 public:
  WindowedSource(const KeyValueShape& shape, const SourceOptions& options);
  ~WindowedSource() override;

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
    Piece(const Extent& extent, std::int64_t begin, std::int64_t end, BufferPool* pool)
        : first(begin),
          last(end),
          k(extent.k, begin - extent.first, end - extent.first, pool),
          v(extent.v, begin - extent.first, end - extent.first, pool) {}
    std::int64_t first, last;
    Window k, v;
    Prefetcher::Batch batch;
  };

  void clear();
  /// Makes pieces until enough are ahead; waits for the keys of the first one only.
  void fill();
  std::unique_ptr<Piece> make_piece(const Extent& extent, std::int64_t begin, std::int64_t end);

  KeyValueShape shape_;
  std::int64_t piece_keys_;
  bool past_cache_ = false;  // what is to be read does not fit into the page cache
  bool in_use_ = false;      // the first piece has been given
  std::int64_t next_ = 0, end_ = 0;
  BufferPool pool_;
  std::deque<std::unique_ptr<Piece>> pieces_;
  /// Mapped pieces that were used, by their first key: a model's next token needs them again, and
  /// their page tables are what takes longest to make.
  std::map<std::int64_t, std::unique_ptr<Piece>> kept_;
  Prefetcher prefetcher_;
};

}  // namespace keyfold::store

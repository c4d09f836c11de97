// Windows ahead of their use, and kept behind it where the page cache has them.
#include "store/windowed_source.hpp"

#include <algorithm>
#include <bit>
#include <string>

#include "store/page_cache.hpp"

namespace keyfold::store {
namespace {

constexpr std::size_t kPieces = 4;

std::int64_t key_bytes(const KeyValueShape& s) {
  return s.batch * s.num_kv_heads * (s.head_dim + s.value_dim) * size_of(s.dtype);
}

/// A power of two, so that pieces begin and end where splits do.
std::int64_t piece_keys(const KeyValueShape& s, std::int64_t ahead_bytes) {
  const std::int64_t keys = ahead_bytes / static_cast<std::int64_t>(kPieces) / key_bytes(s);
  return static_cast<std::int64_t>(
      std::bit_floor(static_cast<std::uint64_t>(std::max<std::int64_t>(keys, 1))));
}

}  // namespace

void check_options(const SourceOptions& options) {
  const auto check = [](const char* name, std::int64_t value, std::int64_t least,
                        std::int64_t most) {
    if (value >= least && value <= most) return;
    throw InvalidArgument(name, "expected " + std::to_string(least) + " to " +
                                    std::to_string(most) + ", got " + std::to_string(value));
  };
  check("ahead_bytes", options.ahead_bytes, 1, std::int64_t{1} << 60);
  check("num_threads", options.num_threads, 1, 64);
}

WindowedSource::WindowedSource(const KeyValueShape& shape, const SourceOptions& options)
    : shape_(shape),
      piece_keys_(piece_keys(shape, options.ahead_bytes)),
      prefetcher_(options.num_threads) {}

WindowedSource::~WindowedSource() { clear(); }

void WindowedSource::clear() {
  for (const auto& piece : pieces_) prefetcher_.cancel(piece->batch);
  pieces_.clear();
  in_use_ = false;
}

void WindowedSource::seek(std::int64_t begin, std::int64_t end) {
  release();
  clear();
  next_ = begin;
  end_ = end;
  // Keys that fit are there when they are read again; of others, none would be.
  const std::int64_t keys = std::max<std::int64_t>(std::min(end, size()) - begin, 0);
  past_cache_ = keys > page_cache_bytes() / 2 / key_bytes(shape_);
}

void WindowedSource::release() {
  if (!in_use_) return;
  in_use_ = false;
  std::unique_ptr<Piece> piece = std::move(pieces_.front());
  pieces_.pop_front();
  piece->k.check();
  piece->v.check();
  if (piece->k.is_mapped() && piece->v.is_mapped()) kept_[piece->first] = std::move(piece);
}

std::unique_ptr<WindowedSource::Piece> WindowedSource::make_piece(const Extent& extent,
                                                                  std::int64_t begin,
                                                                  std::int64_t end) {
  if (const auto found = kept_.find(begin); found != kept_.end()) {
    std::unique_ptr<Piece> piece = std::move(found->second);
    kept_.erase(found);
    if (piece->last == end) return piece;
  }
  BufferPool* const pool = past_cache_ ? &pool_ : nullptr;
  std::unique_ptr<Piece> piece;
  try {
    piece = std::make_unique<Piece>(extent, begin, end, pool);
  } catch (const IoError&) {
    if (kept_.empty()) throw;
    kept_.clear();  // the address space is limited
    piece = std::make_unique<Piece>(extent, begin, end, pool);
  }
  for (const Window* window : {&piece->k, &piece->v}) {
    // What is in the page cache is mapped by its use, at less cost than ahead of it.
    if (!window->is_cached()) prefetcher_.request(piece->batch, *window);
  }
  return piece;
}

void WindowedSource::fill() {
  while (pieces_.size() < kPieces && next_ < end_) {
    const std::optional<Extent> found = extent(next_, pieces_.empty());
    if (!found) return;
    const std::int64_t begin = next_;
    const std::int64_t end = std::min({(begin / piece_keys_ + 1) * piece_keys_, found->end, end_});
    pieces_.push_back(make_piece(*found, begin, end));
    next_ = end;
  }
}

KeyValuePiece WindowedSource::next() {
  release();
  fill();
  if (pieces_.empty()) {
    const auto none = [&](std::int64_t dim) {
      return TensorView(nullptr, shape_.dtype, {shape_.batch, shape_.num_kv_heads, 0, dim});
    };
    return {none(shape_.head_dim), none(shape_.value_dim)};
  }
  Piece& first = *pieces_.front();
  prefetcher_.wait(first.batch);
  in_use_ = true;
  return {first.k.view(), first.v.view()};
}

}  // namespace keyfold::store

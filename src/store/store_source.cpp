// A store's blocks as extents; waiting for keys that are still to come.
#include "store/store_source.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

namespace keyfold::store {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kBetweenLooks{2};
constexpr std::int64_t kNoEnd = std::numeric_limits<std::int64_t>::max();

class StoreSource final : public WindowedSource {
 public:
  StoreSource(std::shared_ptr<const File> file, const Layout& layout, const Position& end,
              const SourceOptions& options, const FollowOptions* follow)
      : WindowedSource(layout.shape, options),
        file_(std::move(file)),
        layout_(layout),
        log_(file_, layout),
        end_(end) {
    if (follow) follow_ = *follow;
  }

  std::int64_t size() const override {
    return follow_ && follow_->until ? *follow_->until : end_.keys;
  }
  bool grows() const override { return follow_ && !follow_->until; }

 protected:
  std::optional<Extent> extent(std::int64_t key, bool wait) override {
    if (key >= last()) return std::nullopt;
    if (key >= end_.keys && follow_) end_ = log_.advance(end_);
    if (key >= end_.keys && !(follow_ && wait && await(key))) return std::nullopt;
    const std::int64_t block = key / layout_.block_len, first = block * layout_.block_len;
    return Extent{layout_.k(file_, block), layout_.v(file_, block), first,
                  std::min({first + layout_.block_len, end_.keys, last()})};
  }

 private:
  /// Behind the last key that will be given.
  std::int64_t last() const { return grows() ? kNoEnd : size(); }

  /// Whether the key came, before the writer closed the store.
  bool await(std::int64_t key) {
    const Clock::time_point start = Clock::now();
    for (;;) {
      const std::optional<Record> mark = log_.mark();
      const bool closed = mark && mark->kind == Record::Kind::kClosed;
      end_ = log_.advance(end_);
      if (key < end_.keys) return true;
      if (closed && !follow_->until) return false;
      if (follow_->stop_token.stop_requested()) {
        throw Cancelled(fmt::format("cancelled while waiting for key {} of {}; nothing was written",
                                    key, file_->path()),
                        {});
      }
      const std::chrono::duration<double> waited = Clock::now() - start;
      if (follow_->timeout_s && waited.count() > *follow_->timeout_s) {
        throw IoError(fmt::format("{}: expected key {} within {} s, got {} keys so far",
                                  file_->path(), key, *follow_->timeout_s, end_.keys));
      }
      if (follow_->waiting) follow_->waiting();
      std::this_thread::sleep_for(kBetweenLooks);
    }
  }

  std::shared_ptr<const File> file_;
  Layout layout_;
  LogReader log_;
  Position end_;
  std::optional<FollowOptions> follow_;
};

}  // namespace

std::unique_ptr<KeyValueSource> make_store_source(const std::shared_ptr<const File>& file,
                                                  const Layout& layout, const Position& end,
                                                  const SourceOptions& options,
                                                  const FollowOptions* follow) {
  check_options(options);
  return std::make_unique<StoreSource>(file, layout, end, options, follow);
}

}  // namespace keyfold::store

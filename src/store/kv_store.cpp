// KvStore: opens, recovers, checks arguments; the parts do the rest.
#include "keyfold/kv_store.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <utility>

#include "store/store_source.hpp"
#include "store/store_writer.hpp"

namespace keyfold {

class KvStore::Impl {
 public:
  /// An existing file, to be read, or by `lock` appended to.
  Impl(std::shared_ptr<store::File> file, std::optional<Durability> durability)
      : file_(std::move(file)), layout_(store::read_layout(*file_)), log_(file_, layout_) {
    if (durability) store::lock_writer(*file_);
    const bool writing = !durability && store::has_writer(*file_);
    const std::optional<store::Record> mark = log_.mark();
    bool closed = mark && mark->kind == store::Record::Kind::kClosed;
    store::LogEnd end = log_.find_end(!writing && !closed);
    if (closed && static_cast<std::uint64_t>(end.committed.keys) > mark->first) {
      closed = false;  // what was appended since outlived the machine, the mark did not
      end = log_.find_end(!writing);
    }
    if (mark && static_cast<std::uint64_t>(end.committed.keys) < mark->first) {
      throw InvalidArgument(
          path(),
          fmt::format("expected {} {} keys, as when it was {}, got {}: it was truncated, "
                      "or the log of the block at byte {} is damaged",
                      closed ? "all" : "at least", mark->first, closed ? "closed" : "appended to",
                      end.committed.keys, layout_.block_begin(end.committed.block)));
    }
    end_ = end.committed;
    recovery_.closed = writing || closed;
    if (!recovery_.closed) {
      recovery_.dropped_keys = end.dropped_keys;
      recovery_.dropped_bytes = end.dropped_keys * layout_.key_bytes();
    }
    if (durability) writer_.emplace(file_, layout_, end, *durability);
  }
  ~Impl() {
    if (!writer_) return;
    try {
      close();
    } catch (const Error&) {
      store::unlock_writer(*file_);  // what failed is found when it is opened next
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  const std::string& path() const { return file_->path(); }
  const store::Layout& layout() const { return layout_; }
  const RecoveryReport& recovery() const { return recovery_; }

  const store::Position& end() {
    end_ = writer_ ? writer_->end() : log_.advance(end_);
    return end_;
  }

  void append(const TensorView& k, const TensorView& v) {
    if (!writer_) {
      throw InvalidArgument(path(),
                            "expected a store that is open for appending, got one that is "
                            "closed or open for reading");
    }
    if (writer_->failed()) {
      throw IoError(path() +
                    ": expected a store whose writes reached the disk, got one where that "
                    "failed before; open it anew");
    }
    check("k", k, layout_.shape.head_dim, k.sizes[2]);
    check("v", v, layout_.shape.value_dim, k.sizes[2]);
    if (k.sizes[2] > layout_.max_keys() - writer_->end().keys) {
      throw InvalidArgument(
          "k", fmt::format("expected at most {} keys more, as {} was made for {}, "
                           "got {}",
                           layout_.max_keys() - writer_->end().keys, path(), layout_.max_keys(),
                           k.sizes[2]));
    }
    writer_->append(k, v);
  }

  std::unique_ptr<KeyValueSource> source(const SourceOptions& options,
                                         const FollowOptions* follow) {
    return store::make_store_source(file_, layout_, end(), options, follow);
  }

  VerifyReport verify() {
    VerifyReport report;
    const std::int64_t keys = end().keys;
    check_header(keys);
    for (std::int64_t block = 0; block * layout_.block_len < keys; ++block) {
      const store::LogReader::DataChecker checker(log_, block);
      std::optional<store::Record> stop;
      for (const store::Record& record : log_.records(block, stop)) {
        if (static_cast<std::int64_t>(record.first) >= keys) break;
        const std::string error = checker.check(record);
        if (!error.empty()) throw InvalidArgument(path(), error);
        report.records += 1;
        report.keys += static_cast<std::int64_t>(record.count);
      }
    }
    if (report.keys != keys) {
      throw InvalidArgument(
          path(),
          fmt::format("expected records of {} keys, got {}: the log of the block "
                      "at byte {} is damaged",
                      keys, report.keys, layout_.block_begin(report.keys / layout_.block_len)));
    }
    report.bytes = keys * layout_.key_bytes();
    return report;
  }

  void close() {
    if (!writer_) return;
    if (!writer_->failed()) writer_->close();
    end_ = writer_->end();
    writer_.reset();
    store::unlock_writer(*file_);  // sources may keep the file open
  }

 private:
  void check(const char* name, const TensorView& t, std::int64_t dim, std::int64_t count) const {
    const Dims expected{layout_.shape.batch, layout_.shape.num_kv_heads, count, dim};
    if (t.dtype != layout_.shape.dtype) {
      throw InvalidArgument(name, fmt::format("expected dtype {}, as the store has it, got {}",
                                              name_of(layout_.shape.dtype), name_of(t.dtype)));
    }
    if (t.sizes != expected || count < 0) {
      throw InvalidArgument(name,
                            fmt::format("expected sizes [{}, {}, n, {}], the same n for k and "
                                        "v, got [{}]",
                                        expected[0], expected[1], dim, fmt::join(t.sizes, ", ")));
    }
    for (std::size_t i = 0; i < t.sizes.size(); ++i) {
      if (t.strides[i] >= 0 || t.sizes[i] <= 1) continue;
      throw InvalidArgument(name, "expected strides of at least 0");
    }
    if (t.device != Device{}) throw InvalidArgument(name, "expected host memory");
    if (t.data == nullptr && count > 0) {
      throw InvalidArgument(name, "expected data, got a null pointer");
    }
  }

  /// The parts that other readers see, which nothing else depends on.
  void check_header(std::int64_t keys) const {
    const std::optional<store::Record> mark = log_.mark();
    if (!mark) {
      throw InvalidArgument(path(),
                            fmt::format("expected a mark at byte {}, got one whose checksum "
                                        "does not fit: it is damaged",
                                        layout_.mark_begin()));
    }
    const bool closed = mark->kind == store::Record::Kind::kClosed;
    if (!closed) return;  // the header may be under way
    const std::string expected = store::header_text(layout_, keys);
    std::string got(expected.size(), '\0');
    file_->read(0, std::as_writable_bytes(std::span(got)));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (got[i] == expected[i]) continue;
      throw InvalidArgument(path(), fmt::format("expected the safetensors header of its {} keys, "
                                                "got another byte at {}: it is damaged",
                                                keys, i));
    }
  }

  std::shared_ptr<store::File> file_;
  store::Layout layout_;
  store::LogReader log_;
  store::Position end_;
  RecoveryReport recovery_;
  std::optional<store::StoreWriter> writer_;
};

KvStore::KvStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KvStore::~KvStore() = default;
KvStore::KvStore(KvStore&&) noexcept = default;
KvStore& KvStore::operator=(KvStore&&) noexcept = default;

KvStore KvStore::create(const std::string& path, const KeyValueShape& shape,
                        const KvStoreOptions& options, Durability durability) {
  const store::Layout layout = store::make_layout(shape, options);
  KvStore made(
      std::make_unique<Impl>(store::make_store_file(path, layout, durability), durability));
  return made;
}

KvStore KvStore::append_to(const std::string& path, Durability durability) {
  auto file = std::make_shared<store::File>(path, store::File::Mode::kWrite);
  return KvStore(std::make_unique<Impl>(std::move(file), durability));
}

KvStore KvStore::open(const std::string& path) {
  return KvStore(std::make_unique<Impl>(std::make_shared<store::File>(path), std::nullopt));
}

const std::string& KvStore::path() const { return impl_->path(); }
const KeyValueShape& KvStore::shape() const { return impl_->layout().shape; }
std::int64_t KvStore::block_len() const { return impl_->layout().block_len; }
std::int64_t KvStore::max_keys() const { return impl_->layout().max_keys(); }
std::int64_t KvStore::size() const { return impl_->end().keys; }
const RecoveryReport& KvStore::recovery() const { return impl_->recovery(); }
void KvStore::append(const TensorView& k, const TensorView& v) { impl_->append(k, v); }
VerifyReport KvStore::verify() const { return impl_->verify(); }
void KvStore::close() { impl_->close(); }

std::unique_ptr<KeyValueSource> KvStore::source(const SourceOptions& options) const {
  return impl_->source(options, nullptr);
}

std::unique_ptr<KeyValueSource> KvStore::follow(const FollowOptions& options) const {
  if (options.until && *options.until < 0) {
    throw InvalidArgument("until", fmt::format("expected at least 0, got {}", *options.until));
  }
  if (options.timeout_s && !(*options.timeout_s > 0)) {
    throw InvalidArgument("timeout_s",
                          fmt::format("expected more than 0, got {}", *options.timeout_s));
  }
  return impl_->source(options.read, &options);
}

}  // namespace keyfold

// Sources of keys and values, and KvStore, for Python: each serves one call at a time.
#pragma once

#include <atomic>
#include <keyfold/kv_store.hpp>
#include <memory>

#include "options.hpp"
#include "watcher.hpp"

namespace keyfold::python {

/// Refuses a second call while one runs.
class OneCall {
 public:
  OneCall(std::atomic<bool>& busy, const char* what);
  ~OneCall() { busy_ = false; }
  OneCall(const OneCall&) = delete;

 private:
  std::atomic<bool>& busy_;
};

class Source {
 public:
  explicit Source(std::unique_ptr<KeyValueSource> source) : source_(std::move(source)) {}
  /// The keys of a store, also those to come. Python's signal handlers run while it waits.
  static std::unique_ptr<Source> follow(const KvStore& store, FollowOptions options);

  KeyValueShape shape() const { return source_->shape(); }
  std::int64_t size() const { return source_->size(); }
  bool grows() const { return source_->grows(); }
  Report attend(const nb::object& q, const nb::object& out, const nb::object& lse,
                const Options& options, const nb::object& progress);

 private:
  Source() = default;

  Watcher* waiter_ = nullptr;  // of the call that runs
  std::atomic<bool> busy_ = false;
  std::unique_ptr<KeyValueSource> source_;
};

void bind_store(nb::module_& module);

}  // namespace keyfold::python

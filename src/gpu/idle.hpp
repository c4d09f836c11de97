// What is kept from call to call, as making it takes longer than a short call. Used by all threads.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace keyfold::gpu {

/// Things of one kind, any of which serves.
template <class T>
class Idle {
 public:
  /// Null if there is none.
  std::unique_ptr<T> take() {
    const std::lock_guard lock(mutex_);
    if (all_.empty()) return nullptr;
    std::unique_ptr<T> found = std::move(all_.back());
    all_.pop_back();
    return found;
  }
  void put_back(std::unique_ptr<T> thing) noexcept {
    const std::lock_guard lock(mutex_);
    try {
      all_.push_back(std::move(thing));
    } catch (const std::bad_alloc&) {
      return;  // then it is freed
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> all_;
};

/// Buffers, up to 512 MiB of them; a buffer has a `use` and a `size`.
template <class Buffer>
class IdleBuffers {
 public:
  /// What the size of a buffer is rounded up to, so that more calls find one.
  static std::int64_t rounded(std::int64_t size) {
    return (size + kGranule - 1) / kGranule * kGranule;
  }

  /// The smallest of this use that has `size` bytes, and not many more; null if there is none.
  template <class Use>
  std::unique_ptr<Buffer> take(Use use, std::int64_t size) {
    const std::lock_guard lock(mutex_);
    auto best = all_.end();
    for (auto it = all_.begin(); it != all_.end(); ++it) {
      const Buffer& b = **it;
      if (b.use != use || b.size < size || b.size / 2 > size + kGranule) continue;
      if (best == all_.end() || b.size < (*best)->size) best = it;
    }
    if (best == all_.end()) return nullptr;
    std::unique_ptr<Buffer> found = std::move(*best);
    all_.erase(best);
    bytes_ -= found->size;
    return found;
  }
  void put_back(std::unique_ptr<Buffer> buffer) noexcept {
    const std::lock_guard lock(mutex_);
    const std::int64_t size = buffer->size;
    try {
      all_.push_back(std::move(buffer));
    } catch (const std::bad_alloc&) {
      return;  // then it is freed
    }
    bytes_ += size;
    while (bytes_ > kMaxBytes) {
      bytes_ -= all_.front()->size;
      all_.erase(all_.begin());
    }
  }
  /// Frees them all.
  void clear() {
    const std::lock_guard lock(mutex_);
    all_.clear();
    bytes_ = 0;
  }

 private:
  static constexpr std::int64_t kMaxBytes = std::int64_t{512} << 20;
  static constexpr std::int64_t kGranule = 64 << 10;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffer>> all_;  // the longest idle first
  std::int64_t bytes_ = 0;
};

/// A buffer on loan from its device's pool.
template <class Device, class Buffer>
class Lease {
 public:
  Lease() = default;
  template <class Use>
  Lease(std::shared_ptr<Device> device, Use use, std::int64_t size)
      : device_(std::move(device)), buffer_(device_->buffers().take(use, size)) {}
  Lease(Lease&&) noexcept = default;
  Lease& operator=(Lease&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(buffer_, other.buffer_);
    return *this;
  }
  ~Lease() {
    if (buffer_) device_->buffers().put_back(std::move(buffer_));
  }

  explicit operator bool() const { return buffer_ != nullptr; }
  const Buffer* operator->() const { return buffer_.get(); }

 private:
  std::shared_ptr<Device> device_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace keyfold::gpu

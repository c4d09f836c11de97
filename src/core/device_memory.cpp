// Device buffers: a reserved range of addresses each, and a table of these.
#include "core/device_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "core/registry.hpp"
#include "keyfold/device_memory.hpp"

namespace keyfold {
namespace core {
namespace {

struct Entry {
  std::string backend;
  DeviceMemory* memory;
  std::int64_t size;
};

struct Table {
  std::mutex mutex;
  std::map<std::uintptr_t, Entry> ranges;  // by first address
  std::atomic<std::size_t> count{0};       // so that calls without buffers take no lock
};

Table& table() {
  static auto& instance = *new Table;  // never destroyed, as a buffer may be static too
  return instance;
}

}  // namespace

/// Addresses that nothing is behind.
class Reservation {
 public:
  explicit Reservation(std::int64_t bytes) {
    const auto page = static_cast<std::int64_t>(sysconf(_SC_PAGE_SIZE));
    // A page more, so that the end of one buffer is not the beginning of another.
    if (bytes > std::numeric_limits<std::int64_t>::max() - 2 * page) throw std::bad_alloc();
    size_ = static_cast<std::size_t>((bytes + page - 1) / page * page + page);
    data_ = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Reservation() { munmap(data_, size_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  std::size_t size_;
};

namespace {

/// Throws unless the view's elements lie inside the buffer.
void check_inside(const char* name, const TensorView& view, const DeviceAddress& at) {
  std::int64_t last = 0;  // check_view() has found it within 63 bits, in bytes too
  for (std::size_t i = 0; i < view.sizes.size(); ++i)
    if (view.sizes[i] > 1) last += (view.sizes[i] - 1) * view.strides[i];
  const std::int64_t bytes = (last + 1) * size_of(view.dtype);
  if (bytes <= at.size - at.offset) return;
  throw InvalidArgument(name, "expected a view inside its device buffer of " +
                                  std::to_string(at.size) + " bytes, got one of " +
                                  std::to_string(bytes) + " bytes from byte " +
                                  std::to_string(at.offset) + " on");
}

}  // namespace

std::optional<DeviceAddress> find_device_address(const void* address) {
  Table& t = table();
  if (t.count.load(std::memory_order_acquire) == 0) return std::nullopt;
  const auto wanted = reinterpret_cast<std::uintptr_t>(address);
  const std::lock_guard lock(t.mutex);
  auto after = t.ranges.upper_bound(wanted);
  if (after == t.ranges.begin()) return std::nullopt;
  const auto& [begin, entry] = *--after;
  const auto offset = static_cast<std::int64_t>(wanted - begin);
  if (wanted - begin > static_cast<std::uintptr_t>(entry.size)) return std::nullopt;
  return DeviceAddress{entry.backend, entry.memory, offset, entry.size};
}

void check_on_host(const char* name, const void* address) {
  const auto at = find_device_address(address);
  if (!at) return;
  throw InvalidArgument(name, "expected host memory, got a device buffer on backend '" +
                                  at->backend + "'; only k and v can be in device memory");
}

KeySource locate_keys(const TensorView& k, const TensorView& v, std::int64_t first_key) {
  KeySource source{k, v, first_key};
  if (k.device != Device{}) return source;
  const auto at_k = find_device_address(k.data), at_v = find_device_address(v.data);
  if (!at_k && !at_v) return source;
  const bool empty = k.sizes[2] == 0;
  const auto place = [](const auto& at) {
    return at ? "memory on backend '" + at->backend + "'" : std::string("host memory");
  };
  if (place(at_k) != place(at_v)) {
    if (empty) return source;
    throw InvalidArgument("v", "expected " + place(at_k) + ", where k is, got " + place(at_v));
  }
  if (!empty) {
    check_inside("k", k, *at_k);
    check_inside("v", v, *at_v);
  }
  source.k_device = {at_k->memory, at_k->offset};
  source.v_device = {at_v->memory, at_v->offset};
  return source;
}

std::string backend_of(const KeySource& source) {
  if (!source.on_device()) return {};
  const auto at = find_device_address(source.k.data);
  return at ? at->backend : std::string();
}

}  // namespace core

class DeviceBuffer::Impl {
 public:
  Impl(const std::string& backend, std::int64_t bytes)
      : size(bytes), memory_(core::find_backend(backend)->allocate(bytes)), range_(bytes) {
    core::Table& t = core::table();
    const std::lock_guard lock(t.mutex);
    t.ranges.emplace(key(), core::Entry{backend, memory_.get(), bytes});
    t.count = t.ranges.size();
  }
  ~Impl() {
    core::Table& t = core::table();
    const std::lock_guard lock(t.mutex);
    t.ranges.erase(key());
    t.count = t.ranges.size();
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  static const Impl& of(const DeviceBuffer& buffer) {
    if (buffer.impl_) return *buffer.impl_;
    throw InvalidArgument("buffer", "expected a buffer, got one that was moved from");
  }

  void* data() const { return range_.data(); }
  core::DeviceMemory& checked(std::int64_t offset, std::int64_t bytes, const char* name,
                              const void* host) const {
    if (offset < 0 || offset > size) {
      throw InvalidArgument(
          "offset", "expected 0 to " + std::to_string(size) + ", got " + std::to_string(offset));
    }
    if (bytes < 0 || bytes > size - offset) {
      throw InvalidArgument("bytes", "expected 0 to " + std::to_string(size - offset) +
                                         " from byte " + std::to_string(offset) + " of " +
                                         std::to_string(size) + ", got " + std::to_string(bytes));
    }
    if (host == nullptr && bytes > 0) {
      throw InvalidArgument(name, "expected host memory, got a null pointer");
    }
    if (const auto at = core::find_device_address(host)) {
      throw InvalidArgument(
          name, "expected host memory, got a device buffer on backend '" + at->backend + "'");
    }
    return *memory_;
  }

  const std::int64_t size;

 private:
  std::uintptr_t key() const { return reinterpret_cast<std::uintptr_t>(range_.data()); }

  std::shared_ptr<core::DeviceMemory> memory_;
  core::Reservation range_;
};

DeviceBuffer::DeviceBuffer(std::string_view backend, std::int64_t bytes) {
  if (bytes < 1) {
    throw InvalidArgument("bytes", "expected at least 1, got " + std::to_string(bytes));
  }
  try {
    impl_ = std::make_unique<Impl>(std::string(backend), bytes);
  } catch (const std::bad_alloc&) {
    throw RunError(ErrorCode::kOutOfMemory,
                   "out of memory for a device buffer of " + std::to_string(bytes) + " bytes");
  }
}
DeviceBuffer::~DeviceBuffer() = default;
DeviceBuffer::DeviceBuffer(DeviceBuffer&&) noexcept = default;
DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&&) noexcept = default;

void* DeviceBuffer::data() const noexcept { return impl_ ? impl_->data() : nullptr; }
std::int64_t DeviceBuffer::size() const noexcept { return impl_ ? impl_->size : 0; }

void DeviceBuffer::upload(std::int64_t offset, const void* from, std::int64_t bytes) {
  core::DeviceMemory& memory = Impl::of(*this).checked(offset, bytes, "from", from);
  if (bytes > 0) memory.upload(offset, from, bytes);
}

void DeviceBuffer::download(std::int64_t offset, void* to, std::int64_t bytes) const {
  const core::DeviceMemory& memory = Impl::of(*this).checked(offset, bytes, "to", to);
  if (bytes > 0) memory.download(offset, to, bytes);
}

}  // namespace keyfold

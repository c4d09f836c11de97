// Allocation and reuse of memory.
#include "cuda/buffer.hpp"

#include <new>
#include <utility>

namespace keyfold::cuda {
namespace {

constexpr std::int64_t kMaxIdleBytes = std::int64_t{512} << 20;
constexpr std::int64_t kGranule = 64 << 10;  // sizes are rounded up to it

}  // namespace

Buffer::Buffer(const Driver& d, CUcontext c, Use u, std::int64_t wanted)
    : driver(d), context(c), use(u), size((wanted + kGranule - 1) / kGranule * kGranule) {
  const Scope scope(driver, context);
  const auto bytes = static_cast<std::size_t>(size);
  if (use == Use::kDevice) {
    driver.mem_alloc(&address, bytes);
  } else {
    void* memory = nullptr;
    driver.mem_host_alloc(&memory, bytes, 0u);
    host = static_cast<std::byte*>(memory);
  }
}

Buffer::~Buffer() {
  // The context may be gone, with all that was in it.
  if (driver.ctx_push_current.quietly(context) != CUDA_SUCCESS) return;
  if (use == Use::kDevice) {
    driver.mem_free.quietly(address);
  } else {
    driver.mem_free_host.quietly(static_cast<void*>(host));
  }
  CUcontext ignored = nullptr;
  driver.ctx_pop_current.quietly(&ignored);
}

std::unique_ptr<Buffer> BufferPool::allocate(Use use, std::int64_t size) {
  return std::make_unique<Buffer>(driver_, context_, use, size);
}

std::unique_ptr<Buffer> BufferPool::take(Use use, std::int64_t size) {
  {
    const std::lock_guard lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const Buffer& b = **it;
      if (b.use != use || b.size < size || b.size / 2 > size + kGranule) continue;
      if (best == idle_.end() || b.size < (*best)->size) best = it;
    }
    if (best != idle_.end()) {
      std::unique_ptr<Buffer> found = std::move(*best);
      idle_.erase(best);
      idle_bytes_ -= found->size;
      return found;
    }
  }
  try {
    return allocate(use, size);
  } catch (const Failure& failure) {
    if (!failure.out_of_memory()) throw;
    const std::lock_guard lock(mutex_);
    idle_.clear();
    idle_bytes_ = 0;
  }
  return allocate(use, size);
}

void BufferPool::put_back(std::unique_ptr<Buffer> buffer) noexcept {
  const std::lock_guard lock(mutex_);
  const std::int64_t size = buffer->size;
  try {
    idle_.push_back(std::move(buffer));
  } catch (const std::bad_alloc&) {
    return;  // then it is freed
  }
  idle_bytes_ += size;
  while (idle_bytes_ > kMaxIdleBytes) {
    idle_bytes_ -= idle_.front()->size;
    idle_.erase(idle_.begin());
  }
}

}  // namespace keyfold::cuda

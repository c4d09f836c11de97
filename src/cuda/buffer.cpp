// Allocation and reuse of memory.
#include "cuda/buffer.hpp"

#include <utility>

namespace keyfold::cuda {
Buffer::Buffer(const Driver& d, CUcontext c, Use u, std::int64_t wanted)
    : driver(d), context(c), use(u), size(gpu::IdleBuffers<Buffer>::rounded(wanted)) {
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
  if (auto found = idle_.take(use, size)) return found;
  try {
    return allocate(use, size);
  } catch (const Failure& failure) {
    if (!failure.out_of_memory()) throw;
    idle_.clear();
  }
  return allocate(use, size);
}

}  // namespace keyfold::cuda

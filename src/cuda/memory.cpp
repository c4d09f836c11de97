// Device buffers: copies in pieces by way of pinned memory, one on its way while the next is
// filled.
#include "cuda/memory.hpp"

#include <algorithm>
#include <cstring>

#include "cuda/errors.hpp"
#include "cuda/stream.hpp"
#include "gpu/cast.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::int64_t kPieceBytes = 8 << 20;

using gpu::usize;

/// Two pieces of pinned memory, in turn.
struct Pieces {
  Pieces(const std::shared_ptr<Device>& device, std::int64_t total)
      : bytes(std::min(total, kPieceBytes)), memory(device, Use::kPinned, 2 * bytes) {}
  std::byte* at(std::int64_t offset) const { return memory->host + offset / bytes % 2 * bytes; }

  std::int64_t bytes;
  BufferLease memory;
};

}  // namespace

CudaMemory::CudaMemory(Gpu& gpu, std::int64_t bytes) : gpu_(gpu) {
  guard_begin(gpu, [&](const std::shared_ptr<Device>& device) {
    device_ = device;
    buffer_ = device_->buffers().allocate(Use::kDevice, bytes);
  });
}

void CudaMemory::upload(std::int64_t offset, const void* from, std::int64_t bytes) {
  guard_begin(gpu_, [&](const std::shared_ptr<Device>& device) {
    const Pieces pieces(device, bytes);
    Stream stream(device);
    for (std::int64_t at = 0; at < bytes; at += pieces.bytes) {
      const std::int64_t size = std::min(pieces.bytes, bytes - at);
      if (at >= 2 * pieces.bytes) stream.wait();
      std::memcpy(pieces.at(at), static_cast<const std::byte*>(from) + at, usize(size));
      stream.submit([&](CUstream s) {
        device->driver().memcpy_htod_async(buffer_->address + static_cast<CUdeviceptr>(offset + at),
                                           static_cast<const void*>(pieces.at(at)), usize(size), s);
      });
    }
    for (std::int64_t left = std::min<std::int64_t>(2, gpu::ceil_div(bytes, pieces.bytes));
         left > 0; --left) {
      stream.wait();
    }
  });
}

void CudaMemory::download(std::int64_t offset, void* to, std::int64_t bytes) const {
  guard_begin(gpu_, [&](const std::shared_ptr<Device>& device) {
    const Pieces pieces(device, bytes);
    Stream stream(device);
    const auto fetch = [&](std::int64_t at) {
      stream.submit([&](CUstream s) {
        device->driver().memcpy_dtoh_async(static_cast<void*>(pieces.at(at)),
                                           buffer_->address + static_cast<CUdeviceptr>(offset + at),
                                           usize(std::min(pieces.bytes, bytes - at)), s);
      });
    };
    fetch(0);
    for (std::int64_t at = 0; at < bytes; at += pieces.bytes) {
      if (at + pieces.bytes < bytes) fetch(at + pieces.bytes);
      stream.wait();
      std::memcpy(static_cast<std::byte*>(to) + at, pieces.at(at),
                  usize(std::min(pieces.bytes, bytes - at)));
    }
  });
}

}  // namespace keyfold::cuda

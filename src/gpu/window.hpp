// Where the keys and values of a chunk are for a kernel: in tensors on the device, or copied from
// the host into a window, group after group, first all keys and then all values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "core/backend.hpp"
#include "gpu/layout.hpp"
#include "gpu/params.hpp"

namespace keyfold::gpu {

/// Whether kernels can read the rows of a tensor at this address in words of 16 bytes.
bool in_words(const TensorView& tensor, Address at);

/// Whether two chunks meet the same keys of the same groups.
bool same_keys(const ChunkBox& a, const ChunkBox& b);

/// Told of bytes of a window, from an offset on, that are there.
using WhenCopied = std::function<void(std::int64_t offset, std::int64_t bytes)>;

/// Copies a chunk's keys and values; of a batch entry only those before its limit are read, and
/// the room of others is left as it is. Returns the bytes that the window takes. They are there
/// piece after piece, so that one can go on to the device while the next is copied.
std::int64_t copy_keys(const Layout& layout, const ChunkBox& box, const core::KeySource& source,
                       std::byte* to, const WhenCopied& when_copied = {});
/// Fills in k, v and their strides for a window that begins at `window`.
void point_at_window(const Layout& layout, const ChunkBox& box, Address window, Params& params);

/// The same for tensors on the device, whose first elements are at `k` and `v`. Throws RunError
/// where kernels can't read them in words of 16 bytes.
void point_at_tensors(const ChunkBox& box, const core::KeySource& source, Address k, Address v,
                      Params& params);

}  // namespace keyfold::gpu

// What a run gives its kernels: queries and empty states as it begins; for each chunk the numbers
// of Params, what the batch entries see, and the chunk's part of the mask.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/backend.hpp"
#include "gpu/layout.hpp"
#include "gpu/params.hpp"
#include "gpu/waves.hpp"

namespace keyfold::gpu {

/// The rows of a block, each with its heads.
std::int64_t states_of(const Layout& layout, const core::Block& block);

/// The block's queries, [groups][rows * heads][padded_head_dim].
void write_queries(const Layout& layout, const core::Block& block, std::byte* to);
/// Pairs (m, l) of empty states.
void write_empty(std::int64_t states, std::byte* to);
/// What the rows of a batch entry see.
Batch batch_of(const Layout& layout, const core::Block& block, const ChunkBox& box,
               std::size_t entry);
/// Whether that is the same for all entries, as far as the host knows.
bool batches_alike(const core::Problem& problem);
/// A Batch for each batch entry.
void write_batches(const Layout& layout, const core::Block& block, const ChunkBox& box,
                   std::byte* to);

/// All but the addresses, and the strides of k, v and mask.
Params describe(const Layout& layout, const core::Block& block, const ChunkBox& box);
/// Of a chunk's params, those of one wave.
Params part_of(Params chunk, const Wave& wave);
/// The work of a chunk of these params.
Work work_of(const Layout& layout, const core::Block& block, const ChunkBox& box,
             const Params& chunk, std::int64_t max_groups);

/// Copies the chunk's part of the mask, broadcast axes once, and fills in its strides, and as
/// params.mask what is to be added to the address of `to`. Returns the bytes; 0 without a mask.
std::int64_t copy_mask(const Layout& layout, const core::Block& block, const ChunkBox& box,
                       std::byte* to, Params& params);

}  // namespace keyfold::gpu

// Where a call is cut: row blocks by scratch memory, chunks by work.
#pragma once

#include <optional>
#include <vector>

#include "core/backend.hpp"

namespace keyfold::core {

/// Blocks of groups and rows, each within `max_scratch_bytes`, covering these rows of all groups:
/// all of it, else as many whole groups as fit, else rows of one group. Throws InvalidArgument when
/// not even the smallest block fits.
std::vector<Block> plan_blocks(const Problem& problem, const Backend& backend,
                               std::int64_t max_scratch_bytes, int num_threads,
                               std::int64_t row_begin, std::int64_t row_end);

/// How chunks of a block are cut.
struct CutRule {
  std::int64_t split_len = 0;  ///< chunk boundaries are multiples of it
  std::int64_t row_align = 1;  ///< row cuts are multiples of it, counted from the block's first row
  std::int64_t chunk_keys = 0;             ///< keys per chunk, a multiple of split_len; 0: by work
  bool whole = false;                      ///< one chunk, whatever its work
  std::int64_t max_keys = kUnknownLength;  ///< per chunk, whatever the rest says
};

/// Cuts a block's rows x keys into chunks on demand. A sweep is a range of splits; all rows of all
/// groups finish a sweep before the next begins, so that every row sees its splits in ascending
/// order. A chunk takes rows first, then groups, then splits; what no row sees is left out. Where
/// the work allowed shrinks inside a sweep, its last rows take its keys in several chunks. A copy
/// goes on from where the original stood.
class ChunkCutter {
 public:
  /// keys.begin is a multiple of split_len.
  ChunkCutter(const Problem& problem, const Block& block, KeyRange keys, const CutRule& rule);

  /// The next chunk, of at most `max_flops` unless one split of row_align rows holds more; nullopt
  /// at the end.
  std::optional<Chunk> next(double max_flops);
  /// From here on `max_flops` counts more than the rule: no whole chunk, at most chunk_keys keys.
  void obey_work();

 private:
  void begin_sweep(double max_pairs);
  ChunkBox cut(double max_pairs);
  bool is_all(const ChunkBox& box) const;

  const Problem* problem_;
  Block block_;
  KeyRange keys_;
  CutRule rule_;
  std::int64_t sweep_begin_ = 0, sweep_end_ = 0;
  KeyRange rows_{};           // rows of the block that see a key of this sweep
  std::int64_t group_ = 0;    // next group of this sweep
  std::int64_t row_ = 0;      // next row of that group
  std::int64_t key_ = 0;      // next key of those rows: sweep_begin_, unless they are under way
  std::int64_t row_end_ = 0;  // end of the rows under way
  bool keys_given_ = false;   // chunk_keys is kept whatever the work
  bool complete_ = false;     // keys_ began as all keys of the call
};

}  // namespace keyfold::core

// A kernel as it is compiled and launched.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/nvrtc.hpp"

namespace keyfold::cuda {

/// The boxes that a kernel copies by tensor maps: rows x columns (elements) of q, k and v. Columns
/// times the element's size are the width of the swizzle, 32, 64 or 128 bytes, or 16 without one.
struct TensorTiles {
  std::uint32_t q_rows = 0, k_rows = 0, v_rows = 0;
  std::uint32_t columns = 0;
  /// Of the mask, where the kernel copies it, too: keys x heads x rows; 128 bytes of keys.
  std::uint32_t mask_keys = 0, mask_heads = 0, mask_rows = 0;
};

/// All that compiling a kernel needs but the architecture, and launching it but the grid.
struct KernelSpec {
  std::string file;                  ///< of src/cuda/kernels
  std::string entry;                 ///< the kernel's name in it
  std::vector<std::string> options;  ///< for NVRTC: -D..., --fmad=false, ...
  std::uint32_t threads = 0;
  std::uint32_t shared_bytes = 0;  ///< that its launch asks for
  /// Maps of q, k, v and the mask follow Params as arguments: see tensor_map.hpp.
  std::optional<TensorTiles> tiles = {};
  /// Behind them comes a Jobs: blocks take jobs in turn, so that the grid is as large as the
  /// device.
  bool jobs = false;
  /// At last comes an Ends.
  bool ends = false;
  /// It awaits what is in front of it itself, and may be launched before that has ended.
  bool overlaps = false;
  /// Blocks along x are a cluster.
  bool clusters = false;
};

/// kernels/wgmma_jobs.cuh, mask_bits.cu, fold.cuh and pairs.cuh have its twins; those that know no
/// small tiles end before.
struct Jobs {
  std::uint64_t memory = 0;  ///< address of the flags, or of the prepared keys
  std::uint32_t groups = 0, tiles = 0;
  std::uint32_t small = 0,
                units = 0;        ///< tiles of a group that have fewer rows, and their rows / 64
  std::uint64_t prepared = 0;     ///< address of what was prepared
  std::uint32_t prepared_by = 0;  ///< blocks
  std::uint32_t cut = 0;          ///< tiles, the last, that blocks share, by tiles of keys
  std::uint64_t cuts = 0;         ///< address of what they leave at the cuts
  std::uint64_t sums = 0;         ///< address of what is found out of the prepared
  std::uint32_t length = 0;       ///< tiles of keys of each job, where all have the same; else 0
  std::uint32_t unused = 0;
};

/// What of kernels/ the build has put into the library. Throws std::out_of_range.
SourceFile kernel_source(const std::string& file);
/// All files that a kernel may include.
const std::vector<SourceFile>& kernel_headers();

/// The kernel's code, as made now. `target` is Nvrtc::target()'s.
std::vector<std::byte> compile(const Nvrtc& nvrtc, const KernelSpec& spec,
                               const std::string& target, std::string* log = nullptr);

}  // namespace keyfold::cuda

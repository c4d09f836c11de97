// How the work of a submission is cut into dispatches: within a device's limits, and within the
// room for partial states.
#pragma once

#include <cstdint>
#include <vector>

namespace keyfold::gpu {

/// The work of one dispatch. All count from the submission's first group, row index and split.
struct Wave {
  std::int64_t group = 0, num_groups = 0;
  std::int64_t index = 0, num_indices = 0;
  std::int64_t split = 0, num_splits = 0;
};

/// Groups x row indices x splits for a kernel.
struct Work {
  std::int64_t groups = 0, indices = 0, splits = 0;
  std::int64_t tile_rows = 0;   ///< indices of a workgroup
  std::int64_t max_groups = 0;  ///< workgroups along z that the device takes
  std::int64_t partials = 0;    ///< partial states of splits that there is room for
  std::int64_t prepared = 0;    ///< splits of a group that fit into a wave; 0: all
  bool shared = false;          ///< these serve all groups
  bool decode = false;          ///< the kernel gives partial states only
  bool folds = false;           ///< it never gives any
};

struct Waves {
  /// The kernel folds into the states itself; else it gives a partial state for each split of a
  /// wave, and a merge follows.
  bool direct = false;
  std::vector<Wave> waves;
};
/// Splits go side by side where the rows alone would leave a large device idle.
Waves cut_chunk(const Work& work);

/// For the merge of a state into another: one split.
std::vector<Wave> cut_merge(const Work& work);

}  // namespace keyfold::gpu

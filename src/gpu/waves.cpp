// Loops over groups, row indices and splits.
#include "gpu/waves.hpp"

#include <algorithm>

#include "gpu/layout.hpp"

namespace keyfold::gpu {
namespace {

constexpr std::int64_t kMostGroups = 65535;  // workgroups along x or y that every device takes

std::vector<Wave> cut(const Work& work, const Wave& step) {
  std::vector<Wave> waves;
  for (std::int64_t group = 0; group < work.groups; group += step.num_groups) {
    for (std::int64_t index = 0; index < work.indices; index += step.num_indices) {
      for (std::int64_t split = 0; split < work.splits; split += step.num_splits) {
        waves.push_back({group, std::min(step.num_groups, work.groups - group),  //
                         index, std::min(step.num_indices, work.indices - index), split,
                         std::min(step.num_splits, work.splits - split)});
      }
    }
  }
  return waves;
}

}  // namespace

Waves cut_chunk(const Work& work) {
  const std::int64_t tiles = ceil_div(work.indices, work.tile_rows);
  Wave step;
  step.num_groups = std::min(
      {work.groups, work.max_groups, std::max<std::int64_t>(1, work.partials / work.indices)});
  step.num_indices = work.indices;
  step.num_splits =
      std::min({work.splits, work.partials / (work.indices * step.num_groups), kMostGroups});
  const bool direct =
      work.folds ||
      (!work.decode &&
       (work.splits == 1 || 2 * work.indices > work.partials || tiles * work.groups >= kBusyTiles ||
        // A wave of partial states would keep no more of the device busy.
        step.num_groups * step.num_splits <= work.groups));
  if (direct) {
    step.num_groups = std::min(work.groups, work.max_groups);
    step.num_indices = kMostGroups * work.tile_rows;
    step.num_splits = work.splits;
  }
  if (work.prepared > 0) {
    if (!work.shared) step.num_groups = std::min(step.num_groups, work.prepared);
    const std::int64_t sets = work.shared ? 1 : step.num_groups;
    step.num_splits = std::min(step.num_splits, work.prepared / sets);
  }
  return {direct, cut(work, step)};
}

std::vector<Wave> cut_merge(const Work& work) {
  // Partial states of a wave lie one group behind the other: part of a group's rows go alone.
  const std::int64_t most = kMostGroups * work.tile_rows;
  return cut(work, {.num_groups = work.indices <= most ? work.max_groups : 1,
                    .num_indices = most,
                    .num_splits = 1});
}

}  // namespace keyfold::gpu

// Kernels, grids and arguments.
#include "cuda/launcher.hpp"

#include <algorithm>
#include <array>

#include "gpu/chunk.hpp"
#include "gpu/waves.hpp"

namespace keyfold::cuda {

static_assert(sizeof(Launch::Arguments) == sizeof(gpu::Params) + sizeof(gpu::Batch) + 4);

namespace {

/// Keys that rows of a chunk see, at most, as far as masks leave them; 0 where some see less than
/// half as many, or lengths differ.
std::int64_t keys_of_rows(const core::Problem& problem, const gpu::Params& p,
                          const gpu::Batch& alike) {
  if (!gpu::batches_alike(problem)) return 0;
  const auto seen = [&](std::int64_t row) {
    const std::int64_t end = std::min<std::int64_t>(alike.limit, alike.last + row);
    return end - std::max<std::int64_t>(0, alike.first + row);
  };
  const std::int64_t first = seen(p.index_begin / p.heads),
                     last = seen((p.index_end - 1) / p.heads);
  const std::int64_t most = std::max(first, last);
  return 2 * std::min(first, last) >= most ? most : 0;
}

}  // namespace

gpu::Params Launcher::describe(const ChunkBox& box, gpu::Address batches) const {
  gpu::Params p = gpu::describe(layout_, block_, box);
  p.q = memory_.q;
  p.o = memory_.state;
  p.ml = p.o + static_cast<gpu::Address>(layout_.o(gpu::states_of(layout_, block_)));
  p.partial_o = memory_.partial_o;
  p.partial_ml = memory_.partial_ml;
  p.batches = batches;
  return p;
}

Launch Launcher::launch_of(const KernelSpec& spec, Grid grid, const Jobs& jobs,
                           const gpu::Params& params, const Ends& ends) const {
  Launch launch{.function = device_.modules().get(spec),
                .grid = grid,
                .threads = spec.threads,
                .shared_bytes = spec.shared_bytes,
                .overlaps = spec.overlaps,
                .clusters = spec.clusters,
                .arguments = {params, {}, 0}};
  if (spec.tiles) {
    launch.maps =
        encode_tensor_maps(device_.driver(), layout_.problem, *spec.tiles, block_, params, ends.q);
  }
  if (spec.jobs) launch.jobs = jobs;
  if (spec.ends) launch.ends = ends;
  return launch;
}

std::vector<Launch> Launcher::plan(const ChunkBox& box, const gpu::Params& chunk,
                                   const Ends& ends) const {
  const gpu::Batch alike = gpu::batch_of(layout_, block_, box, 0);
  const std::int64_t keys = keys_of_rows(layout_.problem, chunk, alike);
  const gpu::Work work = gpu::work_of(layout_, block_, box, chunk, kMaxGridZ);
  const gpu::Waves cut = gpu::cut_chunk(work);
  const bool partial = !cut.direct;
  const bool ended = ends.out.at != 0;
  const KernelSpec main = shapes_.main(partial, ended);
  const std::optional<KernelSpec> prepare = shapes_.prepare(), sum_up = shapes_.sum_up(),
                                  other = shapes_.other(ended, shapes_.copies_mask(chunk)),
                                  careful = shapes_.careful(ended);
  std::vector<Launch> launches;
  if (const std::optional<Shapes::Cluster> few = shapes_.cluster(cut, chunk.num_keys, ended)) {
    launches.push_back(launch_of(few->kernel, few->grid, {}, chunk, ends));
    launches.back().arguments.alike = alike;
    launches.back().shared_bytes = few->shared_bytes;
    // Where keys become more while a stream is captured, the others have to be there.
    device_.modules().get(main);
    device_.modules().get(shapes_.fold_partials(cut.waves.front()));
    return launches;
  }
  for (const gpu::Wave& wave : cut.waves) {
    const gpu::Params params = gpu::part_of(chunk, wave);
    Jobs jobs = shapes_.jobs_of(wave, memory_.cuts != 0 ? keys : 0);
    jobs.memory = memory_.flags != 0 ? memory_.flags : memory_.prepared;
    jobs.prepared = memory_.prepared;
    if (memory_.prepared != 0) jobs.prepared_by = shapes_.prepare_grid(wave).x;
    jobs.sums = memory_.prepared +
                static_cast<gpu::Address>(layout_.prepared_flags(
                    block_.group_end - block_.group_begin, block_.row_end - block_.row_begin));
    jobs.cuts = memory_.cuts;
    const Grid grid = shapes_.main_grid(wave, jobs, partial);
    // Waves of the same rows follow each other.
    Ends part = ends;
    if (wave.split > 0) part.begins = 0;
    if (wave.split + wave.num_splits < work.splits) part.out = {};
    const auto launch = [&](const KernelSpec& spec, Grid blocks) {
      launches.push_back(launch_of(spec, blocks, jobs, params, part));
      launches.back().arguments.alike = alike;
    };
    if (prepare) launch(*prepare, shapes_.prepare_grid(wave));
    if (sum_up) launch(*sum_up, shapes_.sum_grid(jobs, wave));
    launch(main, grid);
    if (other) launch(*other, grid);
    if (careful) launch(*careful, grid);
    if (partial) launch(shapes_.fold_partials(wave), shapes_.fold_grid(wave, part.out.at != 0));
  }
  return launches;
}

std::vector<Launch> Launcher::plan_merge(gpu::Address other_state, const gpu::Params& whole) const {
  // The other's states are the partials of one split.
  const gpu::Address other_ml =
      other_state + static_cast<gpu::Address>(layout_.o(gpu::states_of(layout_, block_)));
  const KernelSpec merge = shapes_.merge();
  std::vector<Launch> launches;
  for (const gpu::Wave& wave : gpu::cut_merge({.groups = block_.group_end - block_.group_begin,
                               .indices = whole.index_end,
                               .splits = 1,
                               .tile_rows = shapes_.merge_rows(),
                               .max_groups = kMaxGridZ})) {
    gpu::Params p = gpu::part_of(whole, wave);
    const std::int64_t first = wave.group * std::int64_t{whole.index_end} + wave.index;
    p.partial_o = other_state + static_cast<gpu::Address>(layout_.o(first));
    p.partial_ml = other_ml + static_cast<gpu::Address>(layout_.ml(first));
    launches.push_back(launch_of(merge, shapes_.merge_grid(wave), {}, p, {}));
  }
  return launches;
}

void Launcher::run(CUstream stream, const std::vector<Launch>& launches) const {
  for (const Launch& launch : launches) {
    // The driver only reads them.
    std::array<void*, 7> arguments{const_cast<Launch::Arguments*>(&launch.arguments)};
    std::size_t count = 1;
    if (launch.maps) {
      for (const CUtensorMap& map : *launch.maps)
        arguments[count++] = const_cast<CUtensorMap*>(&map);
    }
    if (launch.jobs) arguments[count++] = const_cast<Jobs*>(&*launch.jobs);
    if (launch.ends) arguments[count] = const_cast<Ends*>(&*launch.ends);
    device_.driver().launch(launch.function, {launch.grid.x, launch.grid.y, launch.grid.z},
                            launch.threads, launch.shared_bytes, stream, arguments.data(),
                            launch.overlaps, launch.clusters);
  }
}

}  // namespace keyfold::cuda

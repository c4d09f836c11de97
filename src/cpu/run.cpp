// The schedules of a CPU run.
#include "cpu/run.hpp"

#include <tbb/task_arena.h>

#include <array>
#include <chrono>
#include <cmath>
#include <span>

#include "core/half.hpp"
#include "core/normalise.hpp"
#include "cpu/arenas.hpp"
#include "cpu/loop.hpp"

namespace keyfold::cpu {
namespace {

constexpr std::int64_t kPanels = kSplitLen / kPanel;
constexpr std::int64_t kLeastTaskRows = 12;  // fewer read the packed keys too often
constexpr float kSawNothing = -1;  // the sum l of a partial state that is not to be merged

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t rows_of(const core::Problem& problem, const core::Block& block) {
  return (block.group_end - block.group_begin) * (block.row_end - block.row_begin) *
         problem.group_size();
}

RowSource rows_from(const TensorView& t, std::int64_t b, std::int64_t h, std::int64_t i) {
  const std::int64_t bytes = size_of(t.dtype);
  return {core::element(t, b, h, i, 0), t.dtype, t.strides[2] * bytes, t.strides[3] * bytes,
          t.sizes[3]};
}

/// Work of about 10 us, for which one more thread is worth to be woken.
constexpr double kThreadFlops = 5e5;
constexpr double kThreadBytes = 1 << 17;      // of keys and values
constexpr double kThreadRowFloats = 1 << 15;  // of states that are merged or finished

}  // namespace

CpuRun::CpuRun(const core::Problem& problem, const core::Block& block, const Kernels& kernels,
               int num_threads)
    : problem_(problem),
      block_(block),
      kernels_(kernels),
      most_threads_(num_threads),
      workspace_(Layout(problem, kernels), rows_of(problem, block), num_threads) {}

template <class Work>
void CpuRun::on_threads(double worth, const Work& work) {
  const int threads = worth < most_threads_ ? static_cast<int>(worth) : most_threads_;
  alone_ = threads <= 1;
  if (alone_) return work();
  // What comes later goes where threads are awake, though it may be worth fewer.
  threads_ = std::max(threads_, threads);
  arenas().run(threads_, work);
}

template <class Body>
void CpuRun::for_each(std::int64_t begin, std::int64_t end, const Body& body) const {
  loop(alone_ ? 1 : threads_, begin, end, body);
}

ThreadSpace CpuRun::this_thread() const {
  return workspace_.thread(alone_ ? 0 : tbb::this_task_arena::current_thread_index());
}

CpuRun::Row CpuRun::row_at(std::int64_t group, std::int64_t index) const {
  const std::int64_t kv_heads = problem_.shape.num_kv_heads, heads = problem_.group_size();
  return {group / kv_heads, group % kv_heads * heads + index % heads,
          block_.row_begin + index / heads};
}

RowState CpuRun::state_at(std::int64_t group, std::int64_t index) const {
  const std::int64_t per_group = (block_.row_end - block_.row_begin) * problem_.group_size();
  return workspace_.states().at((group - block_.group_begin) * per_group + index);
}

CpuRun::Split CpuRun::split_at(std::int64_t group, std::int64_t key, std::int64_t key_end) const {
  const auto batch = static_cast<std::size_t>(group / problem_.shape.num_kv_heads);
  return {group, {key, std::min({key + kSplitLen, key_end, problem_.key_limit[batch]})}};
}

void CpuRun::submit(const core::Chunk& chunk, const core::KeySource& source) {
  const auto start = std::chrono::steady_clock::now();
  const bool few = (block_.row_end - block_.row_begin) * problem_.group_size() <= kFewRows;
  const ChunkBox& box = chunk.box;
  const std::int64_t bytes = (box.group_end - box.group_begin) * (box.key_end - box.key_begin) *
                             (problem_.shape.head_dim + problem_.shape.value_dim) *
                             size_of(problem_.shape.dtype);
  const double worth =
      std::max(chunk.flops / kThreadFlops, static_cast<double>(bytes) / kThreadBytes);
  on_threads(worth, [&] {
    if (few) {
      fold_by_splits(box, source);
    } else {
      fold_by_rows(box, source);
    }
  });
  seconds_.push_back(
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

double CpuRun::wait() {
  const double seconds = seconds_.front();
  seconds_.pop_front();
  return seconds;
}

std::int64_t CpuRun::key_rows(const Split& split, std::int64_t first, std::int64_t most,
                              const TensorView& from, const core::KeySource& source,
                              RowSource* rows) const {
  const std::int64_t kv_heads = problem_.shape.num_kv_heads;
  const std::int64_t key = split.keys.begin + first;
  *rows = rows_from(from, split.group / kv_heads, split.group % kv_heads, key - source.first_key);
  return std::min(most, split.keys.end - key);
}

void CpuRun::pack_k(const Split& split, std::int64_t first, const core::KeySource& source,
                    float* panel) const {
  RowSource rows;
  const std::int64_t count = key_rows(split, first, kPanel, source.k, source, &rows);
  kernels_.pack_k(rows, count, panel);
}

void CpuRun::pack_v(const Split& split, std::int64_t first, const core::KeySource& source,
                    float* values) const {
  RowSource rows;
  const std::int64_t count = key_rows(split, first, kPanel, source.v, source, &rows);
  kernels_.pack_v(rows, count, workspace_.layout().padded_value_dim, values);
}

void CpuRun::pack_queries(std::int64_t group, std::int64_t begin, std::int64_t end,
                          float* packed) const {
  for (std::int64_t i = begin; i < end; ++i) {
    const Row row = row_at(group, i);
    kernels_.pack_q(rows_from(problem_.q, row.batch, row.head, row.row),
                    packed + (i - begin) * kMaxDim);
  }
}

Panels CpuRun::gather_biases(const Row& row, core::KeyRange keys, std::int64_t origin, float* bias,
                             Panels* biased) const {
  const TensorView& mask = *problem_.mask;
  const std::int64_t size = size_of(mask.dtype);
  Panels seen = 0;
  *biased = 0;
  for (std::int64_t key = keys.begin; key < keys.end;) {
    const std::int64_t panel = (key - origin) / kPanel;
    const std::int64_t end = std::min(keys.end, origin + (panel + 1) * kPanel);
    const RowSource source{core::element(mask, row.batch, row.head, row.row, key), mask.dtype, 0,
                           mask.strides[3] * size, end - key};
    const Seen here = kernels_.gather_bias(source, bias + (key - origin));
    const auto bit = static_cast<Panels>(1 << panel);
    if (here != Seen::kNothing) seen |= bit;
    if (here == Seen::kBiased) *biased |= bit;
    key = end;
  }
  return seen;
}

bool CpuRun::any_sees(const Split& split, std::int64_t first, std::int64_t begin, std::int64_t end,
                      float* bias) const {
  const core::KeyRange panel{split.keys.begin + first,
                             std::min(split.keys.begin + first + kPanel, split.keys.end)};
  const bool heads_alike = !problem_.mask || problem_.mask->strides[1] == 0;
  for (std::int64_t r = begin; r < end; r += heads_alike ? problem_.group_size() : 1) {
    const Row row = row_at(split.group, r);
    const core::KeyRange keys = problem_.visible(row.batch, row.row).clip(panel);
    Panels biased = 0;
    if (keys.size() == 0) continue;
    if (!problem_.mask || gather_biases(row, keys, split.keys.begin, bias, &biased) != 0) {
      return true;
    }
  }
  return false;
}

Tile CpuRun::make_tile(const Split& split, std::int64_t begin, std::int64_t end, const float* q,
                       const ThreadSpace& space, std::int64_t at) const {
  const std::int64_t origin = split.keys.begin;
  Tile tile;
  tile.num_rows = end - begin;
  tile.q = q;
  tile.words = workspace_.layout().words;
  tile.padded_value_dim = workspace_.layout().padded_value_dim;
  tile.scale = problem_.scale;
  tile.softcap = problem_.softcap;
  tile.scores = space.scores + at * kScoreStride;
  const bool heads_alike = problem_.mask && problem_.mask->strides[1] == 0;
  for (std::int64_t r = 0; r < tile.num_rows; ++r) {
    const Row row = row_at(split.group, begin + r);
    const core::KeyRange keys = problem_.visible(row.batch, row.row).clip(split.keys);
    Panels seen = panels_of(keys.begin - origin, keys.end - origin);
    if (problem_.mask && heads_alike && r > 0 && (begin + r) % problem_.group_size() != 0) {
      seen = tile.seen[r - 1];
      tile.biased[r] = tile.biased[r - 1];
      tile.bias[r] = tile.bias[r - 1];
    } else if (problem_.mask && seen != 0) {
      float* const bias = space.bias + (at + r) * kSplitLen;
      seen = gather_biases(row, keys, origin, bias, &tile.biased[r]);
      tile.bias[r] = bias;
    }
    tile.see(r, keys.begin - origin, keys.end - origin, seen);
  }
  return tile;
}

void CpuRun::reduce_packed(const Tile& tile, const PackedSplit& packed,
                           const RowState& result) const {
  kernels_.score(tile, problem_.shape.dtype, packed.k, 0, kSplitLen);
  kernels_.softmax(tile, result);
  kernels_.weigh(tile, packed.v, 0, kSplitLen, result);
  if (kernels_.all_finite(tile, result)) return;
  kernels_.weigh_exactly(tile, packed.v, 0, kSplitLen, result);
}

void CpuRun::reduce_rows(const Split& split, const core::KeySource& source, std::int64_t begin,
                         std::int64_t end, const ThreadSpace& space, std::int64_t partial) const {
  struct Part {
    Tile tile;
    RowState result;
    bool exactly = false;
  };
  std::array<Part, kFewRows / kDirectRows> parts;
  std::size_t count = 0;
  Panels panels = 0;
  pack_queries(split.group, begin, end, space.q);
  const bool direct = kernels_.score_rows != nullptr;
  const std::int64_t most = direct ? kDirectRows : kernels_.row_tile;
  const std::int64_t row_tile = ceil_div(end - begin, ceil_div(end - begin, most));
  for (std::int64_t row = begin; row < end; row += row_tile) {
    const std::int64_t at = row - begin, tile_end = std::min(end, row + row_tile);
    Part& part = parts[count];
    part.tile = make_tile(split, row, tile_end, space.q + at * kMaxDim, space, at);
    part.result = workspace_.partials().at(partial + at);
    if (part.tile.panels != 0) {
      panels |= part.tile.panels;
      ++count;
      continue;
    }
    for (std::int64_t r = 0; r < part.tile.num_rows; ++r) part.result.l[r] = kSawNothing;
  }
  const std::span<Part> tiles(parts.data(), count);
  // Several tiles share the rows of a panel while these are in the cache; one tile reads all that
  // it sees at once.
  const std::int64_t step = direct && count == 1 ? kSplitLen : kPanel;
  const auto steps = [&](const auto& body) {
    for (std::int64_t key = 0, end_key = 0; key < kSplitLen; key = end_key) {
      const auto seen = [&](std::int64_t k) { return k < kSplitLen && (panels >> k / kPanel & 1); };
      end_key = key + kPanel;
      if (!seen(key)) continue;
      while (end_key - key < step && seen(end_key)) end_key += kPanel;
      body(key, end_key);
    }
  };
  const auto each_tile = [&](std::int64_t key, const auto& body) {
    for (Part& part : tiles) {
      if ((part.tile.panels >> key / kPanel & 1) != 0) body(part);
    }
  };
  steps([&](std::int64_t key, std::int64_t end_key) {
    RowSource rows;
    const std::int64_t count_here = key_rows(split, key, end_key - key, source.k, source, &rows);
    if (!direct) pack_k(split, key, source, space.panel);
    each_tile(key, [&](const Part& part) {
      if (direct) return kernels_.score_rows(part.tile, rows, key, key + count_here);
      kernels_.score(part.tile, problem_.shape.dtype, space.panel, key, end_key);
    });
  });
  for (const Part& part : tiles) kernels_.softmax(part.tile, part.result);
  steps([&](std::int64_t key, std::int64_t end_key) {
    RowSource rows;
    const std::int64_t count_here = key_rows(split, key, end_key - key, source.v, source, &rows);
    if (!direct) pack_v(split, key, source, space.panel);
    each_tile(key, [&](const Part& part) {
      if (direct) return kernels_.weigh_rows(part.tile, rows, key, key + count_here, part.result);
      kernels_.weigh(part.tile, space.panel, key, end_key, part.result);
    });
  });
  bool again = false;
  for (Part& part : tiles) {
    part.exactly = !kernels_.all_finite(part.tile, part.result);
    again |= part.exactly;
  }
  if (!again) return;
  steps([&](std::int64_t first_key, std::int64_t end_key) {
    for (std::int64_t key = first_key; key < end_key; key += kPanel) {
      pack_v(split, key, source, space.panel);
      for (const Part& part : tiles) {
        if (!part.exactly) continue;
        kernels_.weigh_exactly(part.tile, space.panel, key, key + kPanel, part.result);
      }
    }
  });
}

void CpuRun::fold_by_rows(const ChunkBox& box, const core::KeySource& source) {
  const std::int64_t heads = problem_.group_size();
  const Layout& layout = workspace_.layout();
  const std::int64_t row_tile = layout.row_tile;
  const std::int64_t first_row = (box.row_begin - block_.row_begin) * heads;
  const std::int64_t last_row = (box.row_end - block_.row_begin) * heads;
  const std::int64_t rows = last_row - first_row;
  const std::int64_t splits = ceil_div(box.key_end - box.key_begin, kSplitLen);
  const std::int64_t groups = box.group_end - box.group_begin, pairs = groups * splits;
  const auto group_of = [&](std::int64_t pair) { return box.group_begin + pair / splits; };
  const auto split_of = [&](std::int64_t pair) {
    return split_at(group_of(pair), box.key_begin + pair % splits * kSplitLen, box.key_end);
  };
  // A wave is as many pairs of group and split, groups outermost, as there is room for.
  const std::int64_t panels =
      std::min(kPanels, ceil_div(box.key_end - box.key_begin, kPanel));  // of a slot
  const std::int64_t slot_keys = panels * kPanel, wave = kPackedKeys / slot_keys;
  // As many tasks for each thread, of rows that fill the registers.
  const std::int64_t threads = alone_ ? 1 : threads_;
  const std::int64_t wave_rows = std::min(groups, ceil_div(wave, splits)) * rows;
  const std::int64_t wave_tasks = ceil_div(ceil_div(wave_rows, kTaskRows), threads) * threads;
  const std::int64_t least = std::max(kLeastTaskRows, ceil_div(wave_rows, wave_tasks));
  const std::int64_t even = ceil_div(rows, ceil_div(rows, least));
  const std::int64_t task_rows = ceil_div(even, kernels_.row_align) * kernels_.row_align;
  const std::int64_t tasks = ceil_div(rows, task_rows);  // of a group

  for (std::int64_t first = 0; first < pairs; first += wave) {
    const std::int64_t last = std::min(pairs, first + wave);
    for_each(0, (last - first) * panels, [&](std::int64_t i) {
      const std::int64_t slot = i / panels, key = i % panels * kPanel;
      const Split split = split_of(first + slot);
      if (split.keys.begin + key >= split.keys.end) return;
      if (!any_sees(split, key, first_row, last_row, this_thread().bias)) return;
      const PackedSplit packed = workspace_.packed(slot, slot_keys);
      pack_k(split, key, source, packed.k + key * layout.words);
      pack_v(split, key, source, packed.v + key * layout.padded_value_dim);
    });
    const std::int64_t first_group = group_of(first), last_group = group_of(last - 1);
    for_each(0, (last_group - first_group + 1) * tasks, [&](std::int64_t i) {
      const ThreadSpace space = this_thread();
      const std::int64_t group = first_group + i / tasks;
      const std::int64_t begin = first_row + i % tasks * task_rows;
      const std::int64_t end = std::min(last_row, begin + task_rows);
      const std::int64_t group_pair = (group - box.group_begin) * splits;
      pack_queries(group, begin, end, space.q);
      for (std::int64_t pair = std::max(first, group_pair);
           pair < std::min(last, group_pair + splits); ++pair) {
        const Split split = split_of(pair);
        for (std::int64_t row = begin; row < end; row += row_tile) {
          const std::int64_t tile_end = std::min(end, row + row_tile);
          const Tile tile =
              make_tile(split, row, tile_end, space.q + (row - begin) * kMaxDim, space, 0);
          if (tile.panels == 0) continue;
          reduce_packed(tile, workspace_.packed(pair - first, slot_keys), space.result.at(0));
          kernels_.merge(state_at(group, row), space.result.at(0), layout.padded_value_dim,
                         tile.num_rows);
        }
      }
    });
  }
}

void CpuRun::fold_by_splits(const ChunkBox& box, const core::KeySource& source) {
  const std::int64_t heads = problem_.group_size();
  const Layout& layout = workspace_.layout();
  const std::int64_t first_row = (box.row_begin - block_.row_begin) * heads;
  const std::int64_t rows = (box.row_end - box.row_begin) * heads;
  const std::int64_t splits = ceil_div(box.key_end - box.key_begin, kSplitLen);
  const std::int64_t pairs = (box.group_end - box.group_begin) * splits;
  const std::int64_t wave = kPartialRows / rows;  // pairs of group and split, groups outermost
  const auto group_of = [&](std::int64_t pair) { return box.group_begin + pair / splits; };

  for (std::int64_t first = 0; first < pairs; first += wave) {
    const std::int64_t last = std::min(pairs, first + wave);
    for_each(first, last, [&](std::int64_t pair) {
      const std::int64_t key = box.key_begin + pair % splits * kSplitLen;
      reduce_rows(split_at(group_of(pair), key, box.key_end), source, first_row, first_row + rows,
                  this_thread(), (pair - first) * rows);
    });
    const std::int64_t groups = group_of(last - 1) - group_of(first) + 1;
    for_each(0, groups * rows, [&](std::int64_t i) {
      const std::int64_t group = group_of(first) + i / rows, row = i % rows;
      const std::int64_t begin = std::max(first, (group - box.group_begin) * splits);
      const std::int64_t end = std::min(last, (group - box.group_begin + 1) * splits);
      for (std::int64_t pair = begin; pair < end; ++pair) {
        const RowState partial = workspace_.partials().at((pair - first) * rows + row);
        if (*partial.l == kSawNothing) continue;
        kernels_.merge(state_at(group, first_row + row), partial, layout.padded_value_dim, 1);
      }
    });
  }
}

void CpuRun::merge(core::Run& other) {
  const auto& from = dynamic_cast<CpuRun&>(other);
  const RowStates& states = workspace_.states();
  on_threads(static_cast<double>(states.rows * states.padded_dim) / kThreadRowFloats, [&] {
    for_each(0, states.rows, [&](std::int64_t row) {
      kernels_.merge(states.at(row), from.workspace_.states().at(row), states.padded_dim, 1);
    });
  });
}

void CpuRun::for_each_state(const std::function<void(const Row&, const RowState&)>& body) {
  const std::int64_t per_group = (block_.row_end - block_.row_begin) * problem_.group_size();
  const RowStates& states = workspace_.states();
  on_threads(static_cast<double>(states.rows * states.padded_dim) / kThreadRowFloats, [&] {
    for_each(0, states.rows, [&](std::int64_t index) {
      const std::int64_t group = block_.group_begin + index / per_group;
      body(row_at(group, index % per_group), states.at(index));
    });
  });
}

void CpuRun::save(const StateView& to) {
  static constexpr std::array<float, kMaxDim> kNothing{};  // o of a row that has seen no key
  for_each_state([&](const Row& row, const RowState& state) {
    core::save_row(to, row, *state.m, *state.l, *state.l == 0 ? kNothing.data() : state.o);
  });
}

void CpuRun::load(const StateView& from) {
  for_each_state([&](const Row& row, const RowState& state) {
    core::load_row(from, row, *state.m, *state.l, state.o);
  });
}

void CpuRun::finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) {
  for_each_state([&](const Row& row, const RowState& state) {
    std::optional<float> sink;
    if (!problem_.sinks.empty()) sink = problem_.sinks[static_cast<std::size_t>(row.head)];
    const core::RowEnd end = core::end_row(*state.m, *state.l, sink);
    kernels_.finish_row(end, state.o, problem_.shape.value_dim, out.dtype,
                        core::element(out, row.batch, row.head, row.row, 0),
                        out.strides[3] * size_of(out.dtype));
    if (lse) {
      core::store_float(core::element(*lse, row.batch, row.head, row.row, 0), DType::kFloat32,
                        end.lse);
    }
  });
}

}  // namespace keyfold::cpu

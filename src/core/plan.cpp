// Row blocks by scratch memory, chunks by work.
#include "core/plan.hpp"

#include <string>

namespace keyfold::core {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// The largest n in [1, most] with fits(n); 0 if not even 1 fits. fits is monotone.
template <class Fits>
std::int64_t largest(std::int64_t most, const Fits& fits) {
  std::int64_t low = 0, high = most;
  while (low < high) {
    const std::int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// How many units of `unit` pairs `max_pairs` holds, without overflow: at most `most`.
std::int64_t units_within(double max_pairs, double unit, std::int64_t most) {
  const double n = max_pairs / unit;
  return n >= static_cast<double>(most) ? most : static_cast<std::int64_t>(n);
}

}  // namespace

std::vector<Block> plan_blocks(const Problem& problem, const Backend& backend,
                               std::int64_t max_scratch_bytes, int num_threads,
                               std::int64_t row_begin, std::int64_t row_end) {
  const std::int64_t groups = problem.num_groups(), rows = row_end - row_begin;
  const auto bytes = [&](std::int64_t g, std::int64_t r) {
    return backend.scratch_bytes(problem, g, r, num_threads);
  };
  const auto fits = [&](std::int64_t g, std::int64_t r) {
    return bytes(g, r) <= max_scratch_bytes;
  };

  std::int64_t block_rows = rows;
  std::int64_t block_groups = largest(groups, [&](std::int64_t g) { return fits(g, rows); });
  if (block_groups == 0) {
    block_groups = 1;
    block_rows = largest(rows, [&](std::int64_t r) { return fits(1, r); });
    if (block_rows == 0) {
      throw InvalidArgument("max_scratch_bytes", "expected at least " +
                                                     std::to_string(bytes(1, 1)) +
                                                     " (one query row of one group), got " +
                                                     std::to_string(max_scratch_bytes));
    }
    // Blocks of equal length, so that the last one is not a sliver.
    block_rows = ceil_div(rows, ceil_div(rows, block_rows));
  }
  std::vector<Block> blocks;
  for (std::int64_t row = row_begin; row < row_end; row += block_rows) {
    for (std::int64_t group = 0; group < groups; group += block_groups) {
      blocks.push_back({group, std::min(groups, group + block_groups), row,
                        std::min(row_end, row + block_rows)});
    }
  }
  return blocks;
}

ChunkCutter::ChunkCutter(const Problem& problem, const Block& block, KeyRange keys,
                         const CutRule& rule)
    : problem_(&problem),
      block_(block),
      keys_(keys),
      rule_(rule),
      sweep_begin_(keys.begin),
      sweep_end_(keys.begin),
      group_(block.group_end),
      keys_given_(rule.chunk_keys > 0),
      complete_(keys.begin == 0 && keys.end == problem.shape.kv_len) {
  // Keys behind every row's end are not worth a sweep.
  std::int64_t last = keys.begin;
  for (std::int64_t g = block.group_begin; g < block.group_end; g += 1) {
    const std::int64_t batch = g / problem.shape.num_kv_heads;
    last = std::max(last, problem.visible(batch, block.row_end - 1).end);
  }
  keys_.end = std::min(keys_.end, last);
}

void ChunkCutter::begin_sweep(double max_pairs) {
  sweep_begin_ = sweep_end_;
  const std::int64_t left = keys_.end - sweep_begin_;
  std::int64_t keys = left;
  if (!rule_.whole) {
    keys = rule_.chunk_keys;
    if (!keys_given_) {
      const KeyRange first = problem_->rows_seeing({sweep_begin_, sweep_begin_ + rule_.split_len},
                                                   {block_.row_begin, block_.row_end});
      // A sweep is cut into rows and groups where it must be, but never finer than row_align rows.
      const double rows = static_cast<double>(block_.group_end - block_.group_begin) *
                          static_cast<double>(first.size());
      const double per_split = static_cast<double>(problem_->group_size() * rule_.split_len) *
                               std::max(rows, static_cast<double>(rule_.row_align));
      keys = rule_.split_len *
             std::max<std::int64_t>(
                 1, units_within(max_pairs, per_split, ceil_div(left, rule_.split_len)));
      if (rule_.chunk_keys > 0) keys = std::min(keys, rule_.chunk_keys);
    }
  }
  sweep_end_ = sweep_begin_ + std::min({keys, left, rule_.max_keys});
  rows_ = problem_->rows_seeing({sweep_begin_, sweep_end_}, {block_.row_begin, block_.row_end});
  // A row cut stays on the block's grid of row_align rows.
  rows_.begin -= (rows_.begin - block_.row_begin) % rule_.row_align;
  group_ = rows_.size() == 0 ? block_.group_end : block_.group_begin;
  row_ = rows_.begin;
  key_ = sweep_begin_;
}

ChunkBox ChunkCutter::cut(double max_pairs) {
  const double per_row = static_cast<double>(problem_->group_size() * (sweep_end_ - sweep_begin_));
  ChunkBox box{group_, group_ + 1, row_, rows_.end, key_, sweep_end_};
  const std::int64_t groups_left = block_.group_end - group_;
  const std::int64_t whole_groups =
      units_within(max_pairs, per_row * static_cast<double>(rows_.size()), groups_left);
  if (rule_.whole) {
    box.group_end = block_.group_end;
  } else if (key_ > sweep_begin_) {
    box.row_end = row_end_;
  } else if (row_ == rows_.begin && whole_groups > 0) {
    box.group_end = group_ + whole_groups;
  } else {
    const std::int64_t cuts_left = ceil_div(rows_.end - row_, rule_.row_align);
    const std::int64_t cuts = std::max<std::int64_t>(
        1, units_within(max_pairs, per_row * static_cast<double>(rule_.row_align), cuts_left));
    box.row_end = std::min(rows_.end, row_ + cuts * rule_.row_align);
  }
  if (!rule_.whole && !keys_given_ && box.group_end == group_ + 1) {
    // Even the fewest rows may be too much work by now: then these rows take fewer keys at a time.
    const double per_split = static_cast<double>(problem_->group_size() * rule_.split_len) *
                             static_cast<double>(box.row_end - box.row_begin);
    const std::int64_t splits_left = ceil_div(sweep_end_ - key_, rule_.split_len);
    const std::int64_t splits =
        std::max<std::int64_t>(1, units_within(max_pairs, per_split, splits_left));
    box.key_end = std::min(sweep_end_, key_ + splits * rule_.split_len);
  }
  if (box.key_end < sweep_end_) {
    key_ = box.key_end;
    row_end_ = box.row_end;
    return box;
  }
  key_ = sweep_begin_;
  row_ = box.row_end;
  if (row_ == rows_.end) {
    group_ = box.group_end;
    row_ = rows_.begin;
  }
  return box;
}

bool ChunkCutter::is_all(const ChunkBox& box) const {
  return complete_ && box.key_begin == 0 && box.key_end == keys_.end &&
         box.row_begin == block_.row_begin && box.row_end == block_.row_end &&
         box.group_begin == block_.group_begin && box.group_end == block_.group_end;
}

void ChunkCutter::obey_work() {
  rule_.whole = false;
  keys_given_ = false;
}

std::optional<Chunk> ChunkCutter::next(double max_flops) {
  const double max_pairs = max_flops / problem_->flops_per_pair();
  for (;;) {
    while (group_ == block_.group_end) {
      if (sweep_end_ >= keys_.end) return std::nullopt;
      begin_sweep(max_pairs);
    }
    const ChunkBox box = cut(max_pairs);
    const double pairs = problem_->visible_pairs(box);
    if (pairs > 0) return Chunk{box, pairs * problem_->flops_per_pair(), is_all(box)};
  }
}

}  // namespace keyfold::core

// Strided rows to dense rows.
#include "gpu/gather.hpp"

#include <tbb/parallel_for_each.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/half.hpp"

namespace keyfold::gpu {
namespace {

constexpr std::int64_t kTaskBytes = 256 << 10;

void copy_row(const std::byte* from, std::int64_t step, std::int64_t count, std::int64_t size,
              std::byte* to) {
  const auto bytes = static_cast<std::size_t>(size);
  if (step == size || count == 1) {
    std::memcpy(to, from, bytes * static_cast<std::size_t>(count));
    return;
  }
  for (std::int64_t d = 0; d < count; ++d) std::memcpy(to + d * size, from + d * step, bytes);
}

void copy_range(const RowsCopy& c, core::KeyRange rows) {
  const TensorView& t = *c.from;
  const std::int64_t size = size_of(t.dtype), row = t.sizes[3] * size;
  std::byte* to = c.to + (rows.begin - c.rows.begin) * c.pitch;
  const std::byte* from = core::element(t, c.batch, c.head, rows.begin, 0);
  const std::int64_t step = t.strides[2] * size, element = t.strides[3] * size;
  if (row == c.width && row == c.pitch && step == row && element == size) {
    std::memcpy(to, from, static_cast<std::size_t>(row * rows.size()));
    return;
  }
  for (std::int64_t i = rows.begin; i < rows.end; ++i, to += c.pitch, from += step) {
    copy_row(from, element, t.sizes[3], size, to);
    std::memset(to + row, 0, static_cast<std::size_t>(c.width - row));
  }
}

}  // namespace

void copy_rows(std::span<const RowsCopy> copies) {
  struct Task {
    const RowsCopy* copy;
    core::KeyRange rows;
  };
  std::vector<Task> tasks;
  std::int64_t bytes = 0;
  for (const RowsCopy& c : copies) {
    const std::int64_t step = std::max<std::int64_t>(1, kTaskBytes / c.width);
    for (std::int64_t begin = c.rows.begin; begin < c.rows.end; begin += step)
      tasks.push_back({&c, {begin, std::min(c.rows.end, begin + step)}});
    bytes += c.rows.size() * c.width;
  }
  const auto run = [](const Task& task) { copy_range(*task.copy, task.rows); };
  if (bytes > kTaskBytes) {
    tbb::parallel_for_each(tasks.begin(), tasks.end(), run);
  } else {
    std::for_each(tasks.begin(), tasks.end(), run);
  }
}

}  // namespace keyfold::gpu

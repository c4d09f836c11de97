// Counting what a box of a problem holds.
#include "core/problem.hpp"

namespace keyfold::core {

double Problem::visible_pairs(const ChunkBox& box) const {
  const KeyRange keys{box.key_begin, box.key_end};
  double pairs = 0;
  for (std::int64_t group = box.group_begin; group < box.group_end;) {
    const std::int64_t batch = group / shape.num_kv_heads;
    const std::int64_t next = std::min(box.group_end, (batch + 1) * shape.num_kv_heads);
    double in_rows = 0;
    if (rows_alike()) {
      in_rows = static_cast<double>(visible(batch, 0).clip(keys).size()) *
                static_cast<double>(box.row_end - box.row_begin);
    } else {
      for (std::int64_t row = box.row_begin; row < box.row_end; ++row) {
        in_rows += static_cast<double>(visible(batch, row).clip(keys).size());
      }
    }
    pairs += in_rows * static_cast<double>(next - group);
    group = next;
  }
  return pairs * static_cast<double>(group_size());
}

KeyRange Problem::rows_seeing(KeyRange keys, KeyRange rows) const {
  // Both ends of a row's keys move up with the row, so the rows that see a key are a range of rows:
  // from the first whose end is behind keys.begin, to the last whose begin is before keys.end.
  KeyRange result{rows.end, rows.begin};
  for (std::int64_t batch = 0; batch < shape.batch; ++batch) {
    const auto b = static_cast<std::size_t>(batch);
    KeyRange seeing = rows;
    if (key_limit[b] <= keys.begin) continue;
    if (has_window() && window_right) {
      seeing.begin = std::max(seeing.begin, keys.begin - *window_right - q_offset[b]);
    }
    if (has_window() && window_left)
      seeing.end = std::min(seeing.end, keys.end + *window_left - q_offset[b]);
    if (seeing.size() == 0) continue;
    result = {std::min(result.begin, seeing.begin), std::max(result.end, seeing.end)};
  }
  return result;
}

}  // namespace keyfold::core

// The logs, from the last block backwards, and on from a known place.
#include "store/log.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "keyfold/io_error.hpp"

namespace keyfold::store {

std::int64_t LogReader::num_blocks() const {
  const std::int64_t data = file_->size() - layout_.block_begin(0);
  if (data < 0 || data % layout_.block_bytes() != 0) {
    throw InvalidArgument(
        file_->path(), fmt::format("expected {} bytes and whole blocks of {}, got {} bytes: it was "
                                   "truncated",
                                   layout_.block_begin(0), layout_.block_bytes(), file_->size()));
  }
  return data / layout_.block_bytes();
}

std::vector<Record> LogReader::records(std::int64_t block, std::optional<Record>& stop) const {
  constexpr std::int64_t kAtOnce = 128;
  std::array<std::byte, kAtOnce * kRecordBytes> bytes{};
  std::vector<Record> found;
  std::int64_t next = block * layout_.block_len;
  const std::int64_t end = next + layout_.block_len;
  stop = Record{};
  for (std::int64_t slot = 0; slot < layout_.block_len && next < end; ++slot) {
    const std::int64_t at = slot % kAtOnce * kRecordBytes;
    if (at == 0) {
      bytes.fill(std::byte{});
      file_->read(layout_.record_begin(block, slot),
                  std::span(bytes).first(static_cast<std::size_t>(
                      std::min(kAtOnce, layout_.block_len - slot) * kRecordBytes)));
    }
    stop = from_bytes(std::span<const std::byte, kRecordBytes>(bytes.data() + at, kRecordBytes),
                      layout_);
    if (!stop || !stop->is_data()) break;
    const bool fits = stop->first == static_cast<std::uint64_t>(next) && stop->count > 0 &&
                      stop->count <= static_cast<std::uint64_t>(end - next);
    if (!fits) {
      stop.reset();
      break;
    }
    found.push_back(*stop);
    next += static_cast<std::int64_t>(stop->count);
    stop = Record{};
  }
  return found;
}

LogReader::DataChecker::DataChecker(const LogReader& log, std::int64_t block)
    : layout_(log.layout_),
      block_(block),
      k_(layout_.k(log.file_, block), 0, layout_.block_len),
      v_(layout_.v(log.file_, block), 0, layout_.block_len) {}

std::string LogReader::DataChecker::check(const Record& record) const {
  const auto first = static_cast<std::int64_t>(record.first);
  const auto count = static_cast<std::int64_t>(record.count);
  const std::int64_t begin = first - block_ * layout_.block_len;
  const std::uint64_t got = checksum_of(k_.view(), v_.view(), begin, begin + count);
  k_.check();
  v_.check();
  if (got == record.checksum) return {};
  return fmt::format(
      "expected checksum {:016x} of keys {} to {}, in the block at bytes {} to {}, got {:016x}: "
      "they are damaged",
      record.checksum, first, first + count - 1, layout_.block_begin(block_),
      layout_.block_begin(block_ + 1) - 1, got);
}

LogEnd LogReader::find_end(bool check) const {
  LogEnd end;
  const std::int64_t blocks = num_blocks();  // a writer may be adding some
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    const bool last = block == blocks - 1;
    std::optional<Record> stop;
    std::vector<Record> found = records(block, stop);
    if (last && !stop) {
      // A torn record is the last thing that was written. One behind which others are is damaged.
      std::array<std::byte, kRecordBytes> next{};
      const auto slot = static_cast<std::int64_t>(found.size());
      if (slot + 1 < layout_.block_len) file_->read(layout_.record_begin(block, slot + 1), next);
      const std::optional<Record> after = from_bytes(next, layout_);
      if (after && after->kind != Record::Kind::kNone) {
        throw InvalidArgument(file_->path(),
                              fmt::format("expected a record at byte {}, got one whose checksum "
                                          "does not fit: it is damaged",
                                          layout_.record_begin(block, slot)));
      }
    }
    if (last && check && !found.empty()) {
      const DataChecker checker(*this, block);
      for (std::size_t i = 0; i < found.size(); ++i) {
        const std::string error = checker.check(found[i]);
        if (error.empty()) continue;
        if (found[i].kind == Record::Kind::kSynced) throw InvalidArgument(file_->path(), error);
        for (std::size_t j = i; j < found.size(); ++j) {
          end.dropped_keys += static_cast<std::int64_t>(found[j].count);
        }
        end.committed.refused = to_bytes(found[i], layout_);
        found.resize(i);
        stop.reset();
        break;
      }
    }
    std::int64_t keys = block * layout_.block_len;
    for (const Record& record : found) keys += static_cast<std::int64_t>(record.count);
    if (!last && keys != (block + 1) * layout_.block_len) {
      throw InvalidArgument(
          file_->path(),
          fmt::format("expected records of all {} keys in the block at byte {}, got {}: one at "
                      "byte {} is damaged",
                      layout_.block_len, layout_.block_begin(block),
                      keys - block * layout_.block_len,
                      layout_.record_begin(block, static_cast<std::int64_t>(found.size()))));
    }
    if (!stop || stop->kind != Record::Kind::kNone) end.torn = true;
    if (stop && stop->kind == Record::Kind::kBegun && end.dropped_keys == 0) {
      end.dropped_keys = static_cast<std::int64_t>(stop->checksum);
    }
    while (!found.empty() && !found.back().ends_append()) {
      end.torn = true;
      end.dropped_keys += static_cast<std::int64_t>(found.back().count);
      keys -= static_cast<std::int64_t>(found.back().count);
      end.committed.refused.reset();  // without its end, this is not taken anyway
      found.pop_back();
    }
    end.committed.block = block;
    end.committed.slot = static_cast<std::int64_t>(found.size());
    end.committed.keys = keys;
    if (!found.empty()) return end;
    end.torn = true;  // a block without an append was to hold one
  }
  return end;
}

Position LogReader::advance(Position from) const {
  Position at = from;
  for (;;) {
    const std::int64_t in_block = at.keys - at.block * layout_.block_len;
    if (in_block == layout_.block_len) {
      at.block += 1;
      at.slot = 0;
    }
    if (layout_.record_begin(at.block, at.slot) >= file_->size()) return from;
    RecordBytes bytes{};
    file_->read(layout_.record_begin(at.block, at.slot), bytes);
    const std::optional<Record> record = from_bytes(bytes, layout_);
    if (!record || !record->is_data() || record->first != static_cast<std::uint64_t>(at.keys)) {
      return from;
    }
    if (bytes == at.refused && !DataChecker(*this, at.block).check(*record).empty()) return from;
    at.refused.reset();
    at.slot += 1;
    at.keys += static_cast<std::int64_t>(record->count);
    if (record->ends_append()) from = at;
  }
}

std::optional<Record> LogReader::mark() const {
  RecordBytes bytes{};
  file_->read(layout_.mark_begin(), bytes);
  return from_bytes(bytes, layout_);
}

}  // namespace keyfold::store

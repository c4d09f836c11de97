// The order of writes that makes an append whole, and the writer's lock.
#include "store/store_writer.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "keyfold/io_error.hpp"

namespace keyfold::store {

StoreWriter::StoreWriter(std::shared_ptr<File> file, const Layout& layout, const LogEnd& end,
                         Durability durability)
    : file_(std::move(file)), layout_(layout), end_(end.committed), durability_(durability) {
  num_blocks_ = (end_.keys + layout_.block_len - 1) / layout_.block_len;
  if (end.torn) {
    file_->resize(layout_.block_begin(num_blocks_));
    if (end_.keys % layout_.block_len != 0) clear_log();
  }
  write_mark(Record::Kind::kOpen);
  sync();  // a store that says it is closed has the header of a closed one
  write_header(std::nullopt);
}

/// Records that were dropped must not look like the end of a later append.
void StoreWriter::clear_log() {
  const RecordBytes zeros{};
  RecordBytes bytes{};
  for (std::int64_t slot = end_.slot; slot < layout_.block_len; ++slot) {
    file_->read(layout_.record_begin(end_.block, slot), bytes);
    if (bytes == zeros) break;
    file_->write(layout_.record_begin(end_.block, slot), zeros);
  }
}

void StoreWriter::append(const TensorView& k, const TensorView& v) {
  const std::int64_t count = k.sizes[2], blocks_before = num_blocks_;
  if (count == 0) return;
  Position at = end_;
  try {
    for (std::int64_t done = 0; done < count;) {
      if (at.keys == num_blocks_ * layout_.block_len) {
        add_block(num_blocks_);
        at.block = num_blocks_ - 1;
        at.slot = 0;
      }
      const std::int64_t in_block = at.keys - at.block * layout_.block_len;
      const std::int64_t here = std::min(count - done, layout_.block_len - in_block);
      const auto first = static_cast<std::uint64_t>(at.keys);
      write_record(at.block, at.slot,
                   {Record::Kind::kBegun, 0, first, static_cast<std::uint64_t>(count - done)});
      const std::uint64_t checksum = write_data(k, v, done, at.block, in_block, here);
      done += here;
      Record record{Record::Kind::kPart, static_cast<std::uint64_t>(here), first, checksum};
      if (done == count) {
        const bool synced = durability_ == Durability::kMachine;
        if (synced) sync();
        record.kind = synced ? Record::Kind::kSynced : Record::Kind::kCommitted;
        write_record(at.block, at.slot, record);
        if (synced) sync();
      } else {
        write_record(at.block, at.slot, record);
      }
      at.slot += 1;
      at.keys += here;
    }
  } catch (...) {
    // What was written is not committed, and the next append begins in the same place.
    if (num_blocks_ > blocks_before) {
      num_blocks_ = blocks_before;
      try {
        file_->resize(layout_.block_begin(num_blocks_));
      } catch (const IoError&) {
        failed_ = true;
      }
    }
    throw;
  }
  end_ = at;
}

void StoreWriter::add_block(std::int64_t block) {
  if (block > 0) {
    // Whatever the durability: so only the last block can be lost with the machine.
    sync();
    write_mark(Record::Kind::kOpen);
  }
  file_->resize(layout_.block_begin(block + 1));
  num_blocks_ = block + 1;
}

std::uint64_t StoreWriter::write_data(const TensorView& k, const TensorView& v, std::int64_t from,
                                      std::int64_t block, std::int64_t at, std::int64_t count) {
  Checksum checksum;
  write_rows(checksum, k, from, layout_.k_begin(block), at, count);
  write_rows(checksum, v, from, layout_.v_begin(block), at, count);
  return checksum.value();
}

void StoreWriter::write_rows(Checksum& checksum, const TensorView& t, std::int64_t from,
                             std::int64_t begin, std::int64_t at, std::int64_t count) {
  const std::int64_t size = size_of(t.dtype), dim = t.sizes[3];
  const auto element = static_cast<std::size_t>(size);
  const bool dense = (t.strides[3] == 1 || dim == 1) && (t.strides[2] == dim || count == 1);
  const auto bytes = static_cast<std::size_t>(count * dim * size);
  for (std::int64_t b = 0; b < t.sizes[0]; ++b) {
    for (std::int64_t h = 0; h < t.sizes[1]; ++h) {
      const auto* rows = static_cast<const std::byte*>(t.data) +
                         (b * t.strides[0] + h * t.strides[1] + from * t.strides[2]) * size;
      if (!dense) {
        gathered_.resize(bytes);
        std::byte* to = gathered_.data();
        for (std::int64_t i = 0; i < count; ++i) {
          const std::byte* row = rows + i * t.strides[2] * size;
          for (std::int64_t d = 0; d < dim; ++d, to += size) {
            std::memcpy(to, row + d * t.strides[3] * size, element);
          }
        }
        rows = gathered_.data();
      }
      const std::int64_t row = (b * t.sizes[1] + h) * layout_.block_len + at;
      file_->write(begin + row * dim * size, {rows, bytes});
      checksum.add({rows, bytes});
    }
  }
}

void StoreWriter::write_record(std::int64_t block, std::int64_t slot, const Record& record) {
  file_->write(layout_.record_begin(block, slot), to_bytes(record, layout_));
}

void StoreWriter::write_mark(Record::Kind kind) {
  const auto keys = static_cast<std::uint64_t>(end_.keys);
  file_->write(layout_.mark_begin(), to_bytes({kind, 0, keys, 0}, layout_));
}

void StoreWriter::write_header(std::optional<std::int64_t> keys) {
  const std::string text = header_text(layout_, keys);
  file_->write(0, std::as_bytes(std::span(text)));
}

void StoreWriter::sync() {
  try {
    file_->sync();
  } catch (const IoError&) {
    failed_ = true;
    throw;
  }
}

void StoreWriter::close() {
  sync();
  write_header(end_.keys);
  sync();
  write_mark(Record::Kind::kClosed);
  sync();
}

std::shared_ptr<File> make_store_file(const std::string& path, const Layout& layout,
                                      Durability durability) {
  namespace fs = std::filesystem;
  const fs::path target = fs::absolute(path);
  const std::string temporary =
      (target.parent_path() / fmt::format(".keyfold-{:016x}.tmp", layout.id)).string();
  {
    File file(temporary, File::Mode::kCreate);
    try {
      const std::string header = header_text(layout, 0);
      file.write(0, std::as_bytes(std::span(header)));
      file.write(layout.superblock_begin(), superblock_of(layout));
      std::array<std::byte, kPageBytes> page{};
      const RecordBytes mark = to_bytes({Record::Kind::kClosed, 0, 0, 0}, layout);
      std::copy(mark.begin(), mark.end(), page.begin());
      file.write(layout.mark_begin(), page);
      if (durability == Durability::kMachine) file.sync();
      if (::renameat2(AT_FDCWD, temporary.c_str(), AT_FDCWD, target.c_str(), RENAME_NOREPLACE)) {
        throw IoError("create", path, errno);
      }
    } catch (...) {
      ::unlink(temporary.c_str());
      throw;
    }
  }
  auto file = std::make_shared<File>(path, File::Mode::kWrite);
  if (durability == Durability::kMachine) {
    // The name, too, has to be on the disk.
    const int folder = ::open(target.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0) {
      ::fsync(folder);
      ::close(folder);
    }
  }
  return file;
}

namespace {

struct flock whole_file(short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  return lock;
}

}  // namespace

void lock_writer(const File& file) {
  struct flock lock = whole_file(F_WRLCK);
  if (::fcntl(file.descriptor(), F_OFD_SETLK, &lock) == 0) return;
  if (errno != EAGAIN && errno != EACCES) throw IoError("lock", file.path(), errno);
  throw IoError(file.path() +
                ": expected no other writer, as one at a time may append; got one, "
                "in this process or another");
}

void unlock_writer(const File& file) {
  struct flock lock = whole_file(F_UNLCK);
  ::fcntl(file.descriptor(), F_OFD_SETLK, &lock);
}

bool has_writer(const File& file) {
  struct flock lock = whole_file(F_WRLCK);
  return ::fcntl(file.descriptor(), F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

}  // namespace keyfold::store

#include "haystack.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <keyfold/error.hpp>
#include <keyfold/io_error.hpp>

namespace keyfold::cli {
namespace {

namespace fs = std::filesystem;

std::error_code last_error() { return {errno != 0 ? errno : EIO, std::generic_category()}; }

/// Reads until the file ends or there are `most` bytes.
std::string read_some(std::ifstream& file, std::int64_t most, const std::stop_token& stop_token) {
  constexpr std::int64_t kBlock = 1 << 20;
  std::string text;
  while (file && most > 0) {
    if (stop_token.stop_requested()) throw Cancelled("stopped while reading the text", {});
    const std::size_t size = text.size();
    const std::int64_t block = std::min(kBlock, most);
    text.resize(size + static_cast<std::size_t>(block));
    file.read(text.data() + size, block);
    text.resize(size + static_cast<std::size_t>(file.gcount()));
    most -= file.gcount();
  }
  return text;
}

}  // namespace

Haystack::Haystack(const std::vector<std::string>& paths, std::int64_t bytes,
                   const std::stop_token& stop_token)
    : wanted_(bytes), stop_token_(stop_token) {
  for (const std::string& path : paths) {
    // What the user names and cannot be read is an error.
    if (const std::error_code error = find(path)) throw IoError("read", path, error.value());
  }
  if (size_ < wanted_)
    throw InvalidArgument(
        "FILES", fmt::format("expected at least {} bytes for this --context, got {} bytes in {} "
                             "files of {}; name more files or choose a smaller --context",
                             wanted_, size_, files_.size(), fmt::join(paths, ", ")));
}

std::error_code Haystack::find(const fs::path& path) {
  std::error_code error;
  const bool directory = fs::is_directory(path, error);
  if (error) return error;
  return directory ? find_directory(path) : find_file(path);
}

std::error_code Haystack::find_file(const fs::path& path) {
  if (stop_token_.stop_requested()) throw Cancelled("stopped while reading " + path.string(), {});
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) return last_error();
  File found{path, size_, size_, ""};
  std::error_code error;
  const std::uintmax_t bytes = fs::is_regular_file(path, error) ? fs::file_size(path, error) : 0;
  if (error) return error;
  if (bytes > 0) {
    found.end += static_cast<std::int64_t>(
        std::min<std::uintmax_t>(bytes, static_cast<std::uintmax_t>(wanted_ - size_)));
  } else {
    found.contents = read_some(file, wanted_ - size_, stop_token_);
    if (!file && !file.eof()) return last_error();
    found.end += static_cast<std::int64_t>(found.contents.size());
  }
  size_ = found.end;
  files_.push_back(std::move(found));
  return {};
}

std::error_code Haystack::find_directory(const fs::path& path) {
  std::error_code error;
  std::vector<fs::directory_entry> entries;
  for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error))
    entries.push_back(*it);
  if (error) return error;
  std::sort(entries.begin(), entries.end());
  for (const fs::directory_entry& entry : entries) {
    if (size_ == wanted_) break;
    std::error_code inner;
    if (entry.is_regular_file(inner))
      inner = find_file(entry.path());
    else if (entry.is_directory(inner) && !entry.is_symlink(inner))
      inner = find_directory(entry.path());
    if (inner) ++skipped_;
  }
  return {};
}

std::string Haystack::read(std::int64_t begin, std::int64_t end) const {
  std::string text;
  for (const File& file : files_) {
    const std::int64_t from = std::max(begin, file.begin), to = std::min(end, file.end);
    if (from >= to) continue;
    const std::int64_t offset = from - file.begin, count = to - from;
    if (!file.contents.empty()) {
      text.append(file.contents, static_cast<std::size_t>(offset), static_cast<std::size_t>(count));
      continue;
    }
    errno = 0;
    std::ifstream stream(file.path, std::ios::binary);
    stream.seekg(offset);
    const std::string piece = read_some(stream, count, stop_token_);
    if (static_cast<std::int64_t>(piece.size()) < count)
      throw RunError(ErrorCode::kInvalidArgument,
                     fmt::format("cannot read {}: expected {} bytes from {} on, got {}; did it "
                                 "change?",
                                 file.path.string(), count, offset, piece.size()));
    text += piece;
  }
  return text;
}

Text Haystack::text() const {
  return {size_, [this](std::int64_t begin, std::int64_t end) { return read(begin, end); }};
}

}  // namespace keyfold::cli

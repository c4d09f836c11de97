#include "haystack.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <keyfold/error.hpp>

#include "keyfold/io_error.hpp"

namespace keyfold::cli {
namespace {

namespace fs = std::filesystem;

class Reader {
 public:
  Reader(std::int64_t bytes, const std::stop_token& stop_token)
      : wanted_(static_cast<std::size_t>(bytes)), stop_token_(stop_token) {}

  /// A path that the user named: what cannot be read is an error.
  void read_named(const fs::path& path) {
    std::error_code error;
    const bool directory = fs::is_directory(path, error);
    if (!error) error = directory ? read_directory(path) : read_file(path);
    if (error) throw IoError("read", path.string(), error.value());
  }

  Haystack take() { return std::move(haystack_); }

 private:
  std::error_code read_file(const fs::path& path) {
    constexpr std::size_t kBlock = 1 << 16;
    errno = 0;
    std::ifstream file(path, std::ios::binary);
    std::string& text = haystack_.text;
    while (file && text.size() < wanted_) {
      if (stop_token_.stop_requested())
        throw Cancelled("stopped while reading " + path.string(), {});
      const std::size_t size = text.size();
      text.resize(std::min(size + kBlock, wanted_));
      file.read(text.data() + size, static_cast<std::streamsize>(text.size() - size));
      text.resize(size + static_cast<std::size_t>(file.gcount()));
    }
    if (!file && !file.eof()) return {errno != 0 ? errno : EIO, std::generic_category()};
    ++haystack_.files;
    return {};
  }

  std::error_code read_directory(const fs::path& path) {
    std::error_code error;
    std::vector<fs::directory_entry> entries;
    for (fs::directory_iterator it(path, error), end; !error && it != end; it.increment(error))
      entries.push_back(*it);
    if (error) return error;
    std::sort(entries.begin(), entries.end());
    for (const fs::directory_entry& entry : entries) {
      if (haystack_.text.size() == wanted_) break;
      std::error_code inner;
      if (entry.is_regular_file(inner))
        inner = read_file(entry.path());
      else if (entry.is_directory(inner) && !entry.is_symlink(inner))
        inner = read_directory(entry.path());
      if (inner) ++haystack_.skipped;
    }
    return {};
  }

  Haystack haystack_;
  std::size_t wanted_;
  std::stop_token stop_token_;
};

}  // namespace

Haystack read_haystack(const std::vector<std::string>& paths, std::int64_t bytes,
                       const std::stop_token& stop_token) {
  Reader reader(bytes, stop_token);
  for (const std::string& path : paths) reader.read_named(path);
  Haystack haystack = reader.take();
  const auto found = static_cast<std::int64_t>(haystack.text.size());
  if (found < bytes)
    throw InvalidArgument(
        "FILES", fmt::format("expected at least {} bytes for this --context, got {} bytes in {} "
                             "files of {}; name more files or choose a smaller --context",
                             bytes, found, haystack.files, fmt::join(paths, ", ")));
  return haystack;
}

}  // namespace keyfold::cli

// Keys and values in files, as sources that read ahead of the computation.
#pragma once

#include <memory>
#include <string>

#include "keyfold/io_error.hpp"
#include "keyfold/source.hpp"

namespace keyfold {

/// How a source of a file reads. None of these changes a bit of a result.
struct SourceOptions {
  /// Bytes of k and v that are mapped at a time, in four pieces of which one is computed on, while
  /// the others are read; at least one key. The memory is the page cache's, which gives it back.
  std::int64_t ahead_bytes = std::int64_t{128} << 20;
  /// Threads that read, 1 to 64. They wait for the disk most of the time.
  int num_threads = 4;
};

/// Order of the axes of a file's tensors.
enum class Axes {
  kBHLD,  ///< [batch, heads, len, dim]
  kBLHD,  ///< [batch, len, heads, dim]
};

/// Keys and values in .npy or .safetensors files, PATH[:TENSOR] each; the contents decide the
/// format. Axes that are missing on the left count as 1. Reads headers only; the keys may exceed
/// memory, and a limit of the address space (RLIMIT_AS).
///
/// The files may be replaced by renaming while in use: this source goes on with those that it
/// opened. When one is truncated instead, next(), seek() or release() throws IoError.
///
/// Throws IoError when a file cannot be opened, and InvalidArgument, naming the file, when it is
/// malformed or k and v do not fit together.
KEYFOLD_API std::unique_ptr<KeyValueSource> open_source(const std::string& k, const std::string& v,
                                                        Axes axes = Axes::kBHLD,
                                                        const SourceOptions& options = {});

}  // namespace keyfold

// Keys and values that are not one array: they come from a file, from a stream, piece by piece.
#pragma once

#include <cstdint>

#include "keyfold/attention.hpp"

namespace keyfold {

/// What all pieces of a source have in common.
struct KeyValueShape {
  std::int64_t batch = 1;         ///< >= 1
  std::int64_t num_kv_heads = 1;  ///< key and value heads, >= 1
  std::int64_t head_dim = 1;      ///< of k
  std::int64_t value_dim = 1;     ///< of v
  DType dtype = DType::kFloat32;  ///< of k and v

  bool operator==(const KeyValueShape&) const = default;
};

/// Consecutive keys and their values, in host memory.
struct KeyValuePiece {
  TensorView k;  ///< [batch, num_kv_heads, n, head_dim]
  TensorView v;  ///< [batch, num_kv_heads, n, value_dim]

  std::int64_t size() const { return k.sizes[2]; }
};

/// Gives keys and values in ascending order, a piece at a time. Implement it for keys of your own;
/// open_source() (file_source.hpp) and KvStore (kv_store.hpp) are sources of files. One source is
/// used by one thread at a time.
class KEYFOLD_API KeyValueSource {
 public:
  virtual ~KeyValueSource() = default;

  virtual KeyValueShape shape() const = 0;
  /// Keys that are there now.
  virtual std::int64_t size() const = 0;
  /// Whether more keys may come than size() says.
  virtual bool grows() const { return false; }

  /// From here on next() gives the keys [begin, end), 0 <= begin <= end, in order; keys behind
  /// the source's end do not come. Called before the first next(), and again for every block of
  /// query rows: one call is enough where the state of all rows fits in max_scratch_bytes.
  virtual void seek(std::int64_t begin, std::int64_t end) = 0;
  /// The next one or more keys; none when those asked for, or all that will ever be, have been
  /// given. Its memory stays as it is until the next call of next(), seek() or release(). Pieces of
  /// many splits cost nothing; those that begin and end at multiples of the kernel's split_len
  /// are not copied. May wait. What it throws ends the call.
  virtual KeyValuePiece next() = 0;
  /// The last piece is no longer used. Throws when it turned out not to be what the source holds,
  /// for instance because its file was truncated meanwhile; next() and seek() do so too.
  virtual void release() {}
};

/// Attention over the keys of a source: the formula, the options and the bits of the call over
/// arrays (attention.hpp), whatever the pieces. Keys that no query row sees (causal, window) are
/// skipped, and not asked for.
///
/// q, out and all tensors of the options are in host memory. Where the source may grow, its length
/// is not known beforehand: causal attention and windows need options.q_offset then, and a mask has
/// to reach over all keys that come. kv_lens stay as they are: keys behind the longest do not
/// count, and are not waited for.
///
/// Scratch and staging are those of the call over arrays, beside what the source holds; where the
/// rows take several blocks, the keys are read once for each. Whatever is thrown, by the source
/// too, out and lse are untouched.
KEYFOLD_API Report scaled_dot_product_attention(const TensorView& q, KeyValueSource& source,
                                                const MutableTensorView& out,
                                                const AttentionOptions& options = {});

}  // namespace keyfold

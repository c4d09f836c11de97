// Attention over a KeyValueSource: whole splits are folded where they lie, ragged ends by way of a
// tail.
#include <algorithm>
#include <string>

#include "core/device_memory.hpp"
#include "core/guard.hpp"
#include "core/row_blocks.hpp"
#include "core/tail.hpp"
#include "core/validate.hpp"
#include "keyfold/source.hpp"

namespace keyfold {
namespace core {
namespace {

[[noreturn]] void fail(const std::string& expected, const std::string& got) {
  throw InvalidArgument("source", "expected " + expected + ", got " + got);
}

/// The keys that some row of the block sees, before the mask.
KeyRange keys_seen(const Problem& problem, const Block& block) {
  KeyRange seen{kUnknownLength, 0};
  const std::int64_t heads = problem.shape.num_kv_heads;
  for (std::int64_t b = block.group_begin / heads; b * heads < block.group_end; ++b) {
    // A row's range moves on with its position.
    const KeyRange first = problem.visible(b, block.row_begin);
    const KeyRange last = problem.visible(b, block.row_end - 1);
    if (first.begin >= last.end) continue;
    seen = {std::min(seen.begin, first.begin), std::max(seen.end, last.end)};
  }
  return seen;
}

/// Folds the pieces of a source into one run after another.
class PieceFolder {
 public:
  PieceFolder(Session& session, KeyValueSource& source)
      : session_(session),
        source_(source),
        tail_(session.problem().shape, session.kernel().split_len) {}

  void fold(Run& run, const Block& block) {
    const Problem& problem = session_.problem();
    const KeyRange seen = keys_seen(problem, block);
    if (seen.size() == 0) return;
    tail_.clear();
    end_ = seen.end;
    next_ = folded_ = seen.begin / tail_.room() * tail_.room();
    source_.seek(next_, end_);
    while (next_ < end_) {
      const KeyValuePiece piece = source_.next();
      const std::int64_t count = check_keys(problem.shape, piece.k, piece.v);
      if (count == 0) break;
      check_piece(piece, count);
      take(run, block, {piece.k, piece.v, next_}, count);
    }
    if (next_ < end_ && problem.shape.kv_len != kUnknownLength) {
      fail(std::to_string(end_) + " keys, as it said", "its end behind " + std::to_string(next_));
    }
    fold_tail(run, block);
    source_.release();
  }

 private:
  void check_piece(const KeyValuePiece& piece, std::int64_t count) const {
    check_on_host("source", piece.k.data);
    check_on_host("source", piece.v.data);
    if (count > end_ - next_) {
      fail("at most " + std::to_string(end_ - next_) + " keys more", std::to_string(count));
    }
    const std::optional<TensorView>& mask = session_.problem().mask;
    if (mask && mask->strides[3] != 0 && next_ + count > mask->sizes[3]) {
      throw InvalidArgument("mask", "expected a mask over all keys that come, got one over " +
                                        std::to_string(mask->sizes[3]) + ", and key " +
                                        std::to_string(next_ + count - 1));
    }
  }

  void take(Run& run, const Block& block, const KeySource& piece, std::int64_t count) {
    std::int64_t used = 0;
    if (tail_.size() > 0) {
      used = std::min(count, tail_.room());
      append(piece, {0, used});
      if (tail_.room() == 0) fold_tail(run, block);
    }
    const std::int64_t split_len = session_.kernel().split_len;
    // The last key of all ends a split, wherever it is.
    const std::int64_t whole =
        next_ + count - used == end_ ? count - used : (count - used) / split_len * split_len;
    if (used < count && whole > 0) {
      fold_keys(run, block, piece, {next_, next_ + whole});
      next_ += whole;
      folded_ = next_;
      used += whole;
    }
    if (used < count) append(piece, {used, count});
  }

  void append(const KeySource& piece, KeyRange rows) {
    tail_.append(piece, rows, session_.problem().key_limit);
    next_ += rows.size();
  }

  void fold_tail(Run& run, const Block& block) {
    if (tail_.size() > 0) fold_keys(run, block, tail_.source(folded_), {folded_, next_});
    tail_.clear();
    folded_ = next_;
  }

  void fold_keys(Run& run, const Block& block, const KeySource& keys, KeyRange range) {
    session_.fold(run, block, keys, range);
    session_.keep(run);
  }

  Session& session_;
  KeyValueSource& source_;
  Tail tail_;
  std::int64_t end_ = 0;     // of the keys that the block sees
  std::int64_t next_ = 0;    // absolute position of the next key
  std::int64_t folded_ = 0;  // where the tail begins
};

AttentionShape shape_of(const TensorView& q, const KeyValueSource& source) {
  AttentionShape shape = check_query(q);
  check_device("q", q, {});
  const KeyValueShape keys = source.shape();
  const auto check_same = [](const char* what, std::int64_t expected, std::int64_t got) {
    if (expected == got) return;
    fail(std::string(what) + " " + std::to_string(expected) + ", as q has it", std::to_string(got));
  };
  check_same("batch", shape.batch, keys.batch);
  check_same("head_dim", shape.head_dim, keys.head_dim);
  if (keys.dtype != shape.dtype) {
    fail("dtype " + std::string(name_of(shape.dtype)) + ", as q has it",
         std::string(name_of(keys.dtype)));
  }
  shape.num_kv_heads = keys.num_kv_heads;
  shape.value_dim = keys.value_dim;
  shape.kv_len = source.grows() ? kUnknownLength : source.size();
  return shape;
}

}  // namespace
}  // namespace core

Report scaled_dot_product_attention(const TensorView& q, KeyValueSource& source,
                                    const MutableTensorView& out, const AttentionOptions& options) {
  return core::guard_memory([&] {
    const AttentionShape shape = core::shape_of(q, source);
    core::check_output(shape, out, options.lse);
    core::Session session(core::make_problem(shape, &q, options), options.run);
    core::PieceFolder folder(session, source);
    return core::run_row_blocks(
        session, [&](core::Run& run, const core::Block& block) { folder.fold(run, block); }, out,
        options.lse);
  });
}

}  // namespace keyfold

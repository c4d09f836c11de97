// Row blocks, and the copy of the result that they share.
#include "core/row_blocks.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "core/half.hpp"

namespace keyfold::core {
namespace {

/// out and lse of a call whose rows come in several blocks: kept apart until the last is done.
class Staging {
 public:
  Staging(const AttentionShape& s, bool with_lse)
      : out_data_(static_cast<std::size_t>(staging_bytes(s, false))),
        lse_data_(with_lse ? static_cast<std::size_t>(s.batch * s.num_heads * s.q_len) : 0),
        out_(out_data_.data(), s.dtype, {s.batch, s.num_heads, s.q_len, s.value_dim}) {
    if (with_lse) {
      lse_ =
          MutableTensorView(lse_data_.data(), DType::kFloat32, {s.batch, s.num_heads, s.q_len, 1});
    }
  }

  const MutableTensorView& out() const { return out_; }
  const std::optional<MutableTensorView>& lse() const { return lse_; }

  void commit(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) const {
    copy(out_, out);
    if (lse) copy(*lse_, *lse);
  }

 private:
  static void copy(const MutableTensorView& from, const MutableTensorView& to) {
    const auto size = static_cast<std::size_t>(size_of(to.dtype));
    for (std::int64_t b = 0; b < to.sizes[0]; ++b) {
      for (std::int64_t h = 0; h < to.sizes[1]; ++h) {
        for (std::int64_t i = 0; i < to.sizes[2]; ++i) {
          const std::byte* source = element(from, b, h, i, 0);
          std::byte* target = element(to, b, h, i, 0);
          const auto row = static_cast<std::size_t>(to.sizes[3]);
          if (to.strides[3] == 1) {
            std::memcpy(target, source, row * size);
            continue;
          }
          for (std::size_t d = 0; d < row; ++d) {
            std::memcpy(target + d * size * static_cast<std::size_t>(to.strides[3]),
                        source + d * size, size);
          }
        }
      }
    }
  }

  std::vector<std::byte> out_data_;
  std::vector<float> lse_data_;
  MutableTensorView out_;
  std::optional<MutableTensorView> lse_;
};

/// Runs all blocks; nullopt, with nothing written, when there is no memory for the scratch of one.
std::optional<Report> try_blocks(Session& session, const std::vector<Block>& blocks,
                                 const FoldBlock& fold, const MutableTensorView& out,
                                 const std::optional<MutableTensorView>& lse, std::string& why) {
  const AttentionShape& shape = session.problem().shape;
  std::optional<Staging> staging;
  // On a device the rows are written as they come.
  if (blocks.size() > 1 && session.problem().device == Device{})
    staging.emplace(shape, lse.has_value());
  for (const Block& block : blocks) {
    std::unique_ptr<Run> run;
    try {
      run = session.begin(block);
    } catch (const RunError& error) {
      if (error.code() != ErrorCode::kOutOfMemory) throw;
      why = error.what();
      return std::nullopt;
    }
    fold(*run, block);
    if (staging) {
      session.finish(*run, staging->out(), staging->lse());
    } else {
      session.finish(*run, out, lse);
    }
  }
  Report report = session.report();
  if (staging) {
    staging->commit(out, lse);
    report.staging_bytes = staging_bytes(shape, lse.has_value());
  }
  return report;
}

}  // namespace

std::int64_t staging_bytes(const AttentionShape& s, bool with_lse) {
  const std::int64_t rows = s.batch * s.num_heads * s.q_len;
  return rows * (s.value_dim * size_of(s.dtype) + (with_lse ? 4 : 0));
}

Report run_row_blocks(Session& session, const FoldBlock& fold, const MutableTensorView& out,
                      const std::optional<MutableTensorView>& lse) {
  std::vector<Block> blocks = session.blocks();
  std::string why, tried;
  for (;;) {
    const auto report = try_blocks(session, blocks, fold, out, lse, why);
    if (report) return *report;
    // Half of the scratch, then, in more blocks; at last one query row of one group.
    const std::int64_t bytes = session.scratch_bytes(blocks);
    const std::int64_t least = session.scratch_bytes({{0, 1, 0, 1}});
    tried += (tried.empty() ? "" : ", ") + std::to_string(bytes);
    if (bytes <= least) {
      throw RunError(ErrorCode::kOutOfMemory,
                     "out of memory for scratch, even of one query row at a time (tried " + tried +
                         " bytes): " + why);
    }
    blocks = session.blocks(std::max(bytes / 2, least));
    session.start_over();
  }
}

}  // namespace keyfold::core

// Row blocks, one after another.
#include "core/row_blocks.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "core/staging.hpp"

namespace keyfold::core {
namespace {

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
    report.staging_bytes = Staging::bytes(shape, lse.has_value());
  }
  return report;
}

}  // namespace

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

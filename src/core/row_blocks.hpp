// Runs a call block by block of its query rows, in less memory where there is less.
#pragma once

#include <functional>

#include "core/session.hpp"

namespace keyfold::core {

/// Folds the keys of a block into its run.
using FoldBlock = std::function<void(Run&, const Block&)>;

/// All row blocks of the session's call, one after another: begin, fold, finish. out and lse are
/// written at the end, or not at all. Where scratch cannot be had, begins anew with half of it.
Report run_row_blocks(Session& session, const FoldBlock& fold, const MutableTensorView& out,
                      const std::optional<MutableTensorView>& lse);

}  // namespace keyfold::core

// The one call: validate, plan, run chunk by chunk, finish. And the plan alone.
#include <algorithm>
#include <utility>
#include <vector>

#include "core/device_memory.hpp"
#include "core/guard.hpp"
#include "core/row_blocks.hpp"
#include "core/session.hpp"
#include "core/staging.hpp"
#include "core/validate.hpp"

namespace keyfold {
namespace core {
namespace {

/// Throws InvalidArgument that names the tensor, unless the session's device can reach all of them.
void check_reaches(const Session& session, const TensorView& q, const TensorView& k,
                   const TensorView& v, const TensorView& out, const AttentionOptions& options) {
  const Backend& backend = session.backend();
  backend.check_reaches("q", q);
  backend.check_reaches("out", out);
  if (k.sizes[2] > 0) {
    backend.check_reaches("k", k);
    backend.check_reaches("v", v);
  }
  if (options.mask && k.sizes[2] > 0) backend.check_reaches("mask", *options.mask);
  if (options.sinks) backend.check_reaches("sinks", *options.sinks);
  if (options.lse) backend.check_reaches("lse", *options.lse);
  if (options.device_kv_lens != nullptr) {
    TensorView lengths(options.device_kv_lens, DType::kFloat32, {q.sizes[0], 1, 1, 1});
    backend.check_reaches("device_kv_lens", lengths);
  }
}

}  // namespace
}  // namespace core

Report scaled_dot_product_attention(const TensorView& q, const TensorView& k, const TensorView& v,
                                    const MutableTensorView& out, const AttentionOptions& options) {
  return core::guard_memory([&] {
    const AttentionShape shape = core::check_call(q, k, v);
    core::check_output(shape, out, options.lse, q.device);
    const core::KeySource source = core::locate_keys(k, v, 0);
    core::Problem problem = core::make_problem(shape, &q, options);
    problem.keys_on_device = source.on_device();
    if (q.device != Device{}) problem.device_out = out, problem.device_lse = options.lse;
    core::Session session(std::move(problem), options.run, core::backend_of(source));
    session.check_reaches(source);
    if (q.device != Device{}) core::check_reaches(session, q, k, v, out, options);
    return core::run_row_blocks(
        session,
        [&](core::Run& run, const core::Block& block) {
          session.fold(run, block, source, {0, shape.kv_len});
        },
        out, options.lse);
  });
}

Plan plan(const AttentionShape& shape, const AttentionOptions& options) {
  return core::guard_memory([&] {
    const core::Session session(core::make_problem(shape, nullptr, options), options.run);
    const std::vector<core::Block> blocks = session.blocks();
    const core::KernelInfo& kernel = session.kernel();

    Plan plan;
    plan.backend = session.report().backend;
    plan.kernel = kernel.name;
    plan.split_len = kernel.split_len;
    plan.paced = !session.cut_rule(blocks.front(), shape.kv_len).whole;
    plan.budget_ms = session.settings().budget_seconds * 1e3;
    plan.num_row_blocks = static_cast<std::int64_t>(blocks.size());
    plan.rows_per_block = blocks.front().row_end - blocks.front().row_begin;
    plan.scratch_bytes = session.scratch_bytes(blocks);
    plan.staging_bytes =
        blocks.size() > 1 ? core::Staging::bytes(shape, options.lse.has_value()) : 0;

    core::Pacer pacer(session.settings().budget_seconds, kernel.first_dispatch_flops,
                      kernel.least_flops_per_second);
    for (const core::Block& block : blocks) {
      core::ChunkCutter cutter(session.problem(), block, {0, shape.kv_len},
                               session.cut_rule(block, shape.kv_len));
      while (const auto chunk = cutter.next(pacer.next_flops())) {
        pacer.record(chunk->flops, chunk->flops / kernel.flops_per_second);
        const ChunkBox& box = chunk->box;
        plan.keys_per_chunk = std::max(plan.keys_per_chunk, box.key_end - box.key_begin);
        plan.rows_per_chunk = std::max(plan.rows_per_chunk, box.row_end - box.row_begin);
        plan.chunks.push_back(box);
      }
    }
    return plan;
  });
}

void warm(const AttentionShape& shape, const AttentionOptions& options) {
  core::guard_memory(
      [&] { core::Session(core::make_problem(shape, nullptr, options), options.run).warm(); });
}

}  // namespace keyfold

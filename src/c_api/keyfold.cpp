// The C API's attention and its state.
#include "keyfold/keyfold.h"

#include <utility>

#include "c_api/dlpack.hpp"
#include "c_api/guard.hpp"
#include "c_api/options.hpp"
#include "keyfold/attention.hpp"
#include "keyfold/state.hpp"

using keyfold::c_api::create;
using keyfold::c_api::deref;
using keyfold::c_api::guarded;
using keyfold::c_api::kLseAxes;
using keyfold::c_api::optional_view_of;
using keyfold::c_api::options_of;
using keyfold::c_api::view_of;

struct keyfold_state {
  keyfold::AttentionState state;
};

namespace {

struct LastReport {
  keyfold::Report report;  // owns the strings
  keyfold_report view{};
};
thread_local LastReport last_report;

void keep_report(keyfold::Report report) {
  last_report.report = std::move(report);
  const keyfold::Report& kept = last_report.report;
  last_report.view = {kept.backend.c_str(),     kept.kernel.c_str(), kept.dispatches,
                      kept.longest_dispatch_ms, kept.elapsed_ms,     kept.scratch_bytes,
                      kept.staging_bytes,       kept.recoveries};
}

keyfold::StateView state_view_of(const DLTensor* m, const DLTensor* l, const DLTensor* o) {
  return {view_of(m, "m", kLseAxes), view_of(l, "l", kLseAxes), view_of(o, "o")};
}

}  // namespace

extern "C" {

keyfold_status keyfold_scaled_dot_product_attention(const DLTensor* q, const DLTensor* k,
                                                    const DLTensor* v, const DLTensor* out,
                                                    const keyfold_options* options) {
  return guarded([&] {
    keep_report(keyfold::scaled_dot_product_attention(view_of(q, "q"), view_of(k, "k"),
                                                      view_of(v, "v"), view_of(out, "out"),
                                                      options_of(options)));
  });
}

const keyfold_report* keyfold_last_report(void) {
  return last_report.view.backend == nullptr ? nullptr : &last_report.view;
}

keyfold_status keyfold_merge_state(const DLTensor* out_a, const DLTensor* lse_a,
                                   const DLTensor* out_b, const DLTensor* lse_b) {
  return guarded([&] {
    keyfold::merge_state(view_of(out_a, "out_a"), view_of(lse_a, "lse_a", kLseAxes),
                         view_of(out_b, "out_b"), view_of(lse_b, "lse_b", kLseAxes));
  });
}

keyfold_status keyfold_state_create(const DLTensor* q, const keyfold_options* options,
                                    int64_t first_key, keyfold_state** state) {
  return create(state, "state", [&] {
    return new keyfold_state{
        keyfold::AttentionState(view_of(q, "q"), options_of(options), first_key)};
  });
}

keyfold_status keyfold_state_update(keyfold_state* state, const DLTensor* k, const DLTensor* v) {
  return guarded([&] { deref(state, "state").state.update(view_of(k, "k"), view_of(v, "v")); });
}

keyfold_status keyfold_state_skip_to(keyfold_state* state, int64_t key) {
  return guarded([&] { deref(state, "state").state.skip_to(key); });
}

keyfold_status keyfold_state_merge(keyfold_state* state, keyfold_state* other) {
  return guarded(
      [&] { deref(state, "state").state.merge(std::move(deref(other, "other").state)); });
}

keyfold_status keyfold_state_finish(keyfold_state* state, const DLTensor* out,
                                    const DLTensor* lse) {
  return guarded([&] {
    keep_report(deref(state, "state")
                    .state.finish(view_of(out, "out"), optional_view_of(lse, "lse", kLseAxes)));
  });
}

keyfold_status keyfold_state_save(keyfold_state* state, const DLTensor* m, const DLTensor* l,
                                  const DLTensor* o) {
  return guarded([&] { deref(state, "state").state.save(state_view_of(m, l, o)); });
}

keyfold_status keyfold_state_load(keyfold_state* state, const DLTensor* m, const DLTensor* l,
                                  const DLTensor* o, int64_t num_kv_heads) {
  return guarded([&] { deref(state, "state").state.load(state_view_of(m, l, o), num_kv_heads); });
}

keyfold_status keyfold_state_next_key(const keyfold_state* state, int64_t* next_key) {
  return guarded([&] { deref(next_key, "next_key") = deref(state, "state").state.next_key(); });
}

void keyfold_state_destroy(keyfold_state* state) { delete state; }

}  // extern "C"

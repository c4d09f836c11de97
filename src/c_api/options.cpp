// The C API's options and cancel tokens.
#include "c_api/options.hpp"

#include <string>

#include "c_api/dlpack.hpp"
#include "c_api/guard.hpp"

using keyfold::c_api::create;
using keyfold::c_api::deref;
using keyfold::c_api::guarded;
using keyfold::c_api::kLseAxes;
using keyfold::c_api::kSinksAxes;
using keyfold::c_api::optional_view_of;

struct keyfold_cancel_token {
  std::stop_source source;
};

namespace {

// The setter of one option: runs set(handle) when there is a handle.
template <typename Set>
keyfold_status set_option(keyfold_options* options, Set&& set) noexcept {
  return guarded([&] { set(deref(options, "options")); });
}

void call_progress(keyfold_progress_callback callback, void* user, const keyfold::Progress& at) {
  const keyfold_progress progress = {
      at.dispatches,          at.fraction, at.elapsed_ms, at.last_dispatch_ms,
      at.longest_dispatch_ms, at.next_row, at.next_key};
  const int result = callback(&progress, user);
  if (result != 0) {
    throw keyfold::Cancelled("the progress callback returned " + std::to_string(result) +
                                 " after " + std::to_string(at.dispatches) +
                                 " dispatches, at row " + std::to_string(at.next_row) + ", key " +
                                 std::to_string(at.next_key) + "; nothing was written",
                             at);
  }
}

}  // namespace

keyfold::AttentionOptions keyfold::c_api::options_of(const keyfold_options* options) {
  if (options == nullptr) return {};
  AttentionOptions attention = options->attention;
  attention.kv_lens = options->kv_lens;
  return attention;
}

extern "C" {

keyfold_status keyfold_cancel_token_create(keyfold_cancel_token** token) {
  return create(token, "token", [] { return new keyfold_cancel_token; });
}

keyfold_status keyfold_cancel_token_request(keyfold_cancel_token* token) {
  return guarded([&] { deref(token, "token").source.request_stop(); });
}

void keyfold_cancel_token_destroy(keyfold_cancel_token* token) { delete token; }

keyfold_status keyfold_options_create(keyfold_options** options) {
  return create(options, "options", [] { return new keyfold_options; });
}

void keyfold_options_destroy(keyfold_options* options) { delete options; }

keyfold_status keyfold_options_set_scale(keyfold_options* options, float scale) {
  return set_option(options, [&](keyfold_options& o) { o.attention.scale = scale; });
}

keyfold_status keyfold_options_set_causal(keyfold_options* options, bool causal) {
  return set_option(options, [&](keyfold_options& o) { o.attention.causal = causal; });
}

keyfold_status keyfold_options_set_q_offset(keyfold_options* options, int64_t q_offset) {
  return set_option(options, [&](keyfold_options& o) { o.attention.q_offset = q_offset; });
}

keyfold_status keyfold_options_set_window(keyfold_options* options, int64_t left, int64_t right) {
  const auto bound = [](int64_t side) {
    return side == KEYFOLD_UNBOUNDED ? std::nullopt : std::optional<std::int64_t>(side);
  };
  return set_option(options, [&](keyfold_options& o) {
    o.attention.window = {bound(left), bound(right)};
  });
}

keyfold_status keyfold_options_set_softcap(keyfold_options* options, float softcap) {
  return set_option(options, [&](keyfold_options& o) { o.attention.softcap = softcap; });
}

keyfold_status keyfold_options_set_mask(keyfold_options* options, const DLTensor* mask) {
  return set_option(options,
                    [&](keyfold_options& o) { o.attention.mask = optional_view_of(mask, "mask"); });
}

keyfold_status keyfold_options_set_sinks(keyfold_options* options, const DLTensor* sinks) {
  return set_option(options, [&](keyfold_options& o) {
    o.attention.sinks = optional_view_of(sinks, "sinks", kSinksAxes);
  });
}

keyfold_status keyfold_options_set_kv_lens(keyfold_options* options, const int64_t* kv_lens,
                                           size_t count) {
  return set_option(options, [&](keyfold_options& o) {
    if (count == 0) return o.kv_lens.clear();
    const int64_t* begin = &deref(kv_lens, "kv_lens");
    o.kv_lens.assign(begin, begin + count);
  });
}

keyfold_status keyfold_options_set_device_kv_lens(keyfold_options* options,
                                                  const int32_t* kv_lens) {
  return set_option(options, [&](keyfold_options& o) { o.attention.device_kv_lens = kv_lens; });
}

keyfold_status keyfold_options_set_stream(keyfold_options* options, void* stream) {
  return set_option(options, [&](keyfold_options& o) { o.attention.run.stream = stream; });
}

keyfold_status keyfold_options_set_lse(keyfold_options* options, const DLTensor* lse) {
  return set_option(options, [&](keyfold_options& o) {
    o.attention.lse = optional_view_of(lse, "lse", kLseAxes);
  });
}

keyfold_status keyfold_options_set_backend(keyfold_options* options, const char* backend) {
  return set_option(options, [&](keyfold_options& o) {
    o.attention.run.backend = std::string(&deref(backend, "backend"));
  });
}

keyfold_status keyfold_options_set_budget_ms(keyfold_options* options, double budget_ms) {
  return set_option(options, [&](keyfold_options& o) { o.attention.run.budget_ms = budget_ms; });
}

keyfold_status keyfold_options_set_chunk_size(keyfold_options* options, int64_t chunk_size) {
  return set_option(options, [&](keyfold_options& o) { o.attention.run.chunk_size = chunk_size; });
}

keyfold_status keyfold_options_set_chunk_threshold(keyfold_options* options,
                                                   int64_t chunk_threshold) {
  return set_option(options,
                    [&](keyfold_options& o) { o.attention.run.chunk_threshold = chunk_threshold; });
}

keyfold_status keyfold_options_set_max_scratch_bytes(keyfold_options* options,
                                                     int64_t max_scratch_bytes) {
  return set_option(
      options, [&](keyfold_options& o) { o.attention.run.max_scratch_bytes = max_scratch_bytes; });
}

keyfold_status keyfold_options_set_num_threads(keyfold_options* options, int num_threads) {
  return set_option(options,
                    [&](keyfold_options& o) { o.attention.run.num_threads = num_threads; });
}

keyfold_status keyfold_options_set_progress(keyfold_options* options,
                                            keyfold_progress_callback callback, void* user) {
  return set_option(options, [&](keyfold_options& o) {
    o.attention.run.progress = nullptr;
    if (callback == nullptr) return;
    o.attention.run.progress = [=](const keyfold::Progress& at) {
      call_progress(callback, user, at);
    };
  });
}

keyfold_status keyfold_options_set_cancel_token(keyfold_options* options,
                                                const keyfold_cancel_token* token) {
  return set_option(options, [&](keyfold_options& o) {
    o.attention.run.stop_token = token == nullptr ? std::stop_token() : token->source.get_token();
  });
}

}  // extern "C"

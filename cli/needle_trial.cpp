#include "needle_trial.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <keyfold/attention.hpp>
#include <random>

#include "memory.hpp"

namespace keyfold::cli {
namespace {

double ms_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

/// Embeds the text in blocks, so that a stop is seen in time.
void embed(InductionHeads& heads, std::string_view text, const std::stop_token& stop_token,
           const std::function<void(double)>& progress) {
  constexpr std::size_t kBlock = 1 << 14;
  for (std::size_t begin = 0; begin < text.size(); begin += kBlock) {
    if (stop_token.stop_requested()) throw Cancelled("stopped while embedding the text", {});
    heads.append(text.substr(begin, kBlock));
    progress(static_cast<double>(begin) / static_cast<double>(text.size()));
  }
}

}  // namespace

std::string Needle::fact() const { return question + phrase + "'.\n"; }

Needle make_needle(std::uint64_t seed) {
  // Not std::uniform_int_distribution, which differs between standard libraries.
  std::mt19937_64 random(seed);
  const auto letters = [&random](int count) {
    std::string text;
    while (count-- > 0) text += static_cast<char>('a' + random() % 26);
    return text;
  };
  Needle needle;
  needle.question = "\nThe pass phrase of " + letters(8) + " is '";
  needle.phrase = letters(12);
  return needle;
}

Text hide(const Needle& needle, const Text& haystack, std::int64_t context, std::int64_t depth) {
  const std::string fact = needle.fact();
  const auto planted = static_cast<std::int64_t>(fact.size() + needle.question.size());
  const std::int64_t rest = context - planted;
  if (rest < 0 || rest > haystack.size)
    throw InvalidArgument("context", fmt::format("expected {} to {} bytes, got {}", planted,
                                                 haystack.size + planted, context));
  const std::int64_t at = rest * depth / 100, length = static_cast<std::int64_t>(fact.size());
  return {context, [=, question = needle.question](std::int64_t begin, std::int64_t end) {
            std::string text;
            // A part of the text that begins at `first` there and has `size` bytes.
            const auto add = [&](std::int64_t first, std::int64_t size, const auto& read) {
              const std::int64_t from = std::max(begin, first), to = std::min(end, first + size);
              if (from < to) text += read(from - first, to - first);
            };
            const auto hay = [&](std::int64_t from, std::int64_t to) {
              std::string piece = haystack.read(from, to);
              if (piece.find(question) != std::string::npos)
                throw InvalidArgument("seed",
                                      "the text holds the question already; choose another seed");
              return piece;
            };
            add(0, at, hay);
            add(at, length, Text(fact).read);
            add(at + length, rest - at,
                [&](std::int64_t from, std::int64_t to) { return hay(at + from, at + to); });
            add(rest + length, planted - length, Text(question).read);
            return text;
          }};
}

Answer answer(const Text& text, const HeadShape& shape, std::uint64_t seed, const RunOptions& run,
              Team& team, const std::function<void(double)>& progress) {
  constexpr double kEmbedShare = 0.04, kPrefillShare = 0.92;
  constexpr auto kMost = static_cast<std::int64_t>(kMaxAnswer);
  const auto start = std::chrono::steady_clock::now();
  const auto report = [&progress](double done) {
    if (progress) progress(done);
  };
  const std::int64_t rows = std::min(kPrefillRows, text.size);
  AttentionOptions options;
  options.scale = InductionHeads::kScale;
  options.causal = true;
  options.run = run;

  Answer result;
  reset_peak_memory();
  const AttentionShape prefill{1,         shape.num_heads, shape.num_kv_heads, rows,
                               text.size, shape.head_dim,  shape.head_dim,     shape.dtype};
  AttentionShape decode = prefill;
  decode.q_len = 1;
  const KeySpan share = team.share(text.size, prefill, decode, options);
  const bool has_end = share.begin < text.size && share.end == text.size;  // and all that follows
  const std::int64_t capacity = share.end - share.begin + (has_end ? kMost : 0);
  result.cache_bytes = InductionHeads::cache_bytes(shape, capacity);
  const auto with_context = [&](std::int64_t begin) {
    return std::max<std::int64_t>(0, begin - InductionHeads::kOrders.back());
  };
  InductionHeads heads(shape, seed, capacity, text.read(with_context(share.begin), share.begin));
  embed(heads, text.read(share.begin, share.end), run.stop_token,
        [&](double done) { report(kEmbedShare * done); });
  // The queries stand at the end of the text, whoever has its keys.
  InductionHeads asker(shape, seed, kMost, text.read(with_context(text.size - rows), text.size));
  result.embed_ms = ms_since(start);

  const auto next_byte = [&](std::int64_t count) {
    const TensorView q = asker.queries(count);
    const Report call = team.attend(q, heads.keys(), heads.values(), asker.output(), options);
    (count > 1 ? result.prefill_ms : result.decode_ms) += call.elapsed_ms;
    result.dispatches += call.dispatches;
    result.longest_dispatch_ms = std::max(result.longest_dispatch_ms, call.longest_dispatch_ms);
    result.scratch_bytes = std::max(result.scratch_bytes, call.scratch_bytes + call.staging_bytes);
    result.backend = call.backend;
    result.kernel = call.kernel;
    return team.agree(asker.next_byte());
  };

  options.run.progress = [&](const Progress& now) {
    report(kEmbedShare + kPrefillShare * now.fraction);
  };
  char byte = next_byte(rows);
  options.run.progress = {};
  while (byte != '\'') {
    result.text += byte;
    if (result.text.size() == kMaxAnswer) break;
    asker.append({&byte, 1});
    if (has_end) heads.append({&byte, 1});
    byte = next_byte(1);
    report(1);
  }
  result.peak_bytes = peak_memory();
  return result;
}

}  // namespace keyfold::cli

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

std::string hide(const Needle& needle, std::string_view haystack, std::int64_t context,
                 std::int64_t depth) {
  const std::string fact = needle.fact();
  const auto planted = static_cast<std::int64_t>(fact.size() + needle.question.size());
  const std::int64_t rest = context - planted;
  if (rest < 0 || rest > static_cast<std::int64_t>(haystack.size()))
    throw InvalidArgument("context", fmt::format("expected {} to {} bytes, got {}", planted,
                                                 haystack.size() + planted, context));
  std::string text(haystack.substr(0, static_cast<std::size_t>(rest)));
  if (text.find(needle.question) != std::string::npos)
    throw InvalidArgument("seed", "the text holds the question already; choose another seed");
  text.insert(static_cast<std::size_t>(rest * depth / 100), fact);
  return text + needle.question;
}

Answer answer(std::string_view text, const HeadShape& shape, std::uint64_t seed,
              const RunOptions& run, const std::function<void(double)>& progress) {
  constexpr double kEmbedShare = 0.04, kPrefillShare = 0.92;
  const auto start = std::chrono::steady_clock::now();
  const auto report = [&progress](double done) {
    if (progress) progress(done);
  };
  const auto length = static_cast<std::int64_t>(text.size());
  const std::int64_t capacity = length + static_cast<std::int64_t>(kMaxAnswer);

  Answer result;
  reset_peak_memory();
  result.cache_bytes = InductionHeads::cache_bytes(shape, capacity);
  InductionHeads heads(shape, seed, capacity);
  embed(heads, text, run.stop_token, [&](double done) { report(kEmbedShare * done); });
  result.embed_ms = ms_since(start);

  AttentionOptions options;
  options.scale = InductionHeads::kScale;
  options.causal = true;
  options.run = run;
  const auto next_byte = [&](std::int64_t rows) {
    const TensorView q = heads.queries(rows);
    const Report call =
        scaled_dot_product_attention(q, heads.keys(), heads.values(), heads.output(), options);
    (rows > 1 ? result.prefill_ms : result.decode_ms) += call.elapsed_ms;
    result.dispatches += call.dispatches;
    result.longest_dispatch_ms = std::max(result.longest_dispatch_ms, call.longest_dispatch_ms);
    result.scratch_bytes = std::max(result.scratch_bytes, call.scratch_bytes + call.staging_bytes);
    result.backend = call.backend;
    result.kernel = call.kernel;
    return heads.next_byte();
  };

  options.run.progress = [&](const Progress& now) {
    report(kEmbedShare + kPrefillShare * now.fraction);
  };
  char byte = next_byte(std::min(kPrefillRows, length));
  options.run.progress = {};
  while (byte != '\'') {
    result.text += byte;
    if (result.text.size() == kMaxAnswer) break;
    heads.append({&byte, 1});
    byte = next_byte(1);
    report(1);
  }
  result.peak_bytes = peak_memory();
  return result;
}

}  // namespace keyfold::cli

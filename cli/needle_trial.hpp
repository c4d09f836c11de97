// One needle test: a fact hidden in a text, a question at its end, and attention that answers.
#pragma once

#include <cstdint>
#include <functional>
#include <keyfold/options.hpp>
#include <string>

#include "induction.hpp"
#include "team.hpp"
#include "text.hpp"

namespace keyfold::cli {

/// What is hidden and what is asked for.
struct Needle {
  std::string question;  ///< ends where the answer begins
  std::string phrase;    ///< the answer
  /// The sentence that is hidden: it gives the answer to the question.
  std::string fact() const;
};

/// A question about a random name and a random phrase for it, both drawn from `seed`.
Needle make_needle(std::uint64_t seed);

/// `context` bytes: the beginning of the haystack with the fact after `depth` percent of it, then
/// the question. Throws InvalidArgument if the haystack is too short; reading the text does if a
/// piece of the haystack holds the question itself.
Text hide(const Needle& needle, const Text& haystack, std::int64_t context, std::int64_t depth);

/// How a text was answered and what it took, all attention calls together.
struct Answer {
  std::string text;                ///< what attention said, up to a closing quote
  double embed_ms = 0;             ///< making keys and values; no attention
  double prefill_ms = 0;           ///< the call over the last rows of the text
  double decode_ms = 0;            ///< the calls for one byte each
  std::int64_t dispatches = 0;     ///< of all calls
  double longest_dispatch_ms = 0;  ///< device time
  std::int64_t cache_bytes = 0;    ///< keys and values
  std::int64_t scratch_bytes = 0;  ///< most scratch and staging of a call
  std::int64_t peak_bytes = 0;     ///< most memory that the process held meanwhile; 0: unknown
  std::string backend, kernel;     ///< what ran the calls
};

/// Rows of the prefill call, if the text is as long.
inline constexpr std::int64_t kPrefillRows = 2048;
/// Bytes after which an answer without a closing quote is given up.
inline constexpr std::size_t kMaxAnswer = 32;

/// Lets attention answer: one causal call over the last rows of the text gives the first byte of
/// the answer, then each byte is appended to the keys and values and one row asks for the next.
/// Nothing but the outputs of scaled_dot_product_attention() decides. Each rank of `team` reads and
/// embeds its share of the text and gets the same answer. `progress` gets the share done, 0 to 1.
/// Memory: InductionHeads::cache_bytes() for the share. Throws what attention throws.
Answer answer(const Text& text, const HeadShape& shape, std::uint64_t seed, const RunOptions& run,
              Team& team, const std::function<void(double)>& progress = {});

}  // namespace keyfold::cli

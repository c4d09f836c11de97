#include "call_flags.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "numbers.hpp"

namespace keyfold::cli {
namespace {

constexpr std::int64_t kMaxLength = std::int64_t{1} << 60;  // the library's own limit

/// Reads "L,R", either of which may be empty.
Window parse_window(const std::string& text) {
  const std::size_t comma = text.find(',');
  if (comma == std::string::npos)
    throw InvalidArgument("--window", fmt::format("expected L,R, got '{}'", text));
  const auto side = [](std::string_view part) {
    return part.empty() ? std::nullopt
                        : std::optional(parse_length("--window", part, {0, kMaxLength}));
  };
  return {.left = side(std::string_view(text).substr(0, comma)),
          .right = side(std::string_view(text).substr(comma + 1))};
}

std::string side_text(std::optional<std::int64_t> side) {
  return side ? fmt::format("{}", *side) : "";
}

}  // namespace

void FormulaFlags::add_to(CLI::App& command) {
  const std::string group = "The formula";
  constexpr double kMax = std::numeric_limits<float>::max();
  add_number(command, "--scale", scale_, -kMax, kMax, "Factor on q.k (default: 1/sqrt(head_dim))")
      ->group(group);
  command
      .add_flag("--causal", causal_,
                "Row i sees key j only if j <= i + q_offset (bottom-right aligned by default)")
      ->group(group);
  add_length(command, "--q-offset", q_offset_, {-kMaxLength, kMaxLength},
             "Key position of query row 0 (default: kv_len - q_len)")
      ->group(group);
  add_checked(command, "--window", "L,R",
              "Keys seen before and after a row's own position; an empty side has no bound",
              [this](const std::string& text) { window_ = parse_window(text); })
      ->group(group);
  add_number(command, "--softcap", softcap_, std::numeric_limits<float>::min(), kMax,
             "Scores become softcap * tanh(score / softcap)")
      ->group(group);
  add_lengths(command, "--kv-lens", kv_lens_, {0, kMaxLength},
              "Keys of each batch entry; those behind are never read (default: all)")
      ->group(group);
}

AttentionOptions FormulaFlags::options() const {
  AttentionOptions options;
  if (scale_) options.scale = static_cast<float>(*scale_);
  if (softcap_) options.softcap = static_cast<float>(*softcap_);
  options.causal = causal_;
  options.q_offset = q_offset_;
  options.window = window_;
  options.kv_lens = kv_lens_;
  return options;
}

std::string FormulaFlags::text() const {
  std::string text;
  if (causal_) text += ", causal";
  if (q_offset_) text += fmt::format(", q_offset {}", *q_offset_);
  if (window_.left || window_.right)
    text += fmt::format(", window {},{}", side_text(window_.left), side_text(window_.right));
  if (softcap_) text += fmt::format(", softcap {:.6g}", *softcap_);
  if (scale_) text += fmt::format(", scale {:.6g}", *scale_);
  if (!kv_lens_.empty()) text += fmt::format(", kv_lens {}", fmt::join(kv_lens_, ","));
  return text;
}

nlohmann::ordered_json FormulaFlags::as_json() const {
  const auto or_null = [](const auto& value) {
    return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
  };
  return {
      {"scale", or_null(scale_)},       {"causal", causal_},
      {"q_offset", or_null(q_offset_)}, {"window", {or_null(window_.left), or_null(window_.right)}},
      {"softcap", or_null(softcap_)},   {"kv_lens", kv_lens_}};
}

void ShapeFlags::add_to(CLI::App& command) {
  const std::string group = "The shape";
  const auto length = [&](const char* name, std::int64_t& value, std::int64_t min,
                          const char* help) {
    add_length(command, name, value, {min, kMaxLength}, help)->group(group);
  };
  length("--batch", shape_.batch, 1, "Batch entries");
  length("--heads", shape_.num_heads, 1, "Query heads, a multiple of --kv-heads");
  length("--kv-heads", shape_.num_kv_heads, 1, "Key and value heads");
  length("--q-len", shape_.q_len, 1, "Query rows; 1 is decoding");
  length("--kv-len", shape_.kv_len, 0, "Keys");
  length("--head-dim", shape_.head_dim, 1, "Width of q and k, 1 to 576");
  add_length(command, "--value-dim", value_dim_, {1, kMaxLength},
             "Width of v and out (default: that of --head-dim)")
      ->group(group);
  command.add_option("--dtype", dtype_, "float32, float16 or bfloat16")
      ->check(CLI::IsMember({"float32", "float16", "bfloat16"}))
      ->type_name("TYPE")
      ->capture_default_str()
      ->group(group);
}

AttentionShape ShapeFlags::shape() const {
  AttentionShape shape = shape_;
  shape.value_dim = value_dim_.value_or(shape.head_dim);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16})
    if (dtype_ == name_of(dtype)) shape.dtype = dtype;
  return shape;
}

std::string shape_text(const AttentionShape& s) {
  return fmt::format("q [{0}, {1}, {2}, {3}], k [{0}, {4}, {5}, {3}], v [{0}, {4}, {5}, {6}], {7}",
                     s.batch, s.num_heads, s.q_len, s.head_dim, s.num_kv_heads, s.kv_len,
                     s.value_dim, name_of(s.dtype));
}

nlohmann::ordered_json as_json(const AttentionShape& s) {
  return {{"batch", s.batch},         {"num_heads", s.num_heads}, {"num_kv_heads", s.num_kv_heads},
          {"q_len", s.q_len},         {"kv_len", s.kv_len},       {"head_dim", s.head_dim},
          {"value_dim", s.value_dim}, {"dtype", name_of(s.dtype)}};
}

double visible_pairs(const AttentionShape& shape, const AttentionOptions& options) {
  double pairs = 0;
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    const std::int64_t keys =
        options.kv_lens.empty() ? shape.kv_len : options.kv_lens[static_cast<std::size_t>(b)];
    const std::int64_t offset = options.q_offset.value_or(keys - shape.q_len);
    for (std::int64_t i = 0; i < shape.q_len; ++i) {
      std::int64_t begin = 0, end = keys;
      if (options.causal) end = std::min(end, offset + i + 1);
      if (options.window.right) end = std::min(end, offset + i + *options.window.right + 1);
      if (options.window.left) begin = std::max(begin, offset + i - *options.window.left);
      pairs += static_cast<double>(std::max<std::int64_t>(end - begin, 0));
    }
  }
  return pairs * static_cast<double>(shape.num_heads);
}

}  // namespace keyfold::cli

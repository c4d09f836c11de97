// The flags that say what to compute: the formula of a call and, without data, its shape.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <keyfold/plan.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace keyfold::cli {

/// Flags of AttentionOptions, but for the tensors.
class FormulaFlags {
 public:
  void add_to(CLI::App& command);
  /// Options with these flags; they refer to this object.
  AttentionOptions options() const;
  /// ", causal, window 4095,0" or ""
  std::string text() const;
  /// What was given, null where a default stands.
  nlohmann::ordered_json as_json() const;

 private:
  std::optional<double> scale_, softcap_;
  std::optional<std::int64_t> q_offset_;
  bool causal_ = false;
  Window window_;
  std::vector<std::int64_t> kv_lens_;
};

/// Flags of AttentionShape.
class ShapeFlags {
 public:
  void add_to(CLI::App& command);
  AttentionShape shape() const;

 private:
  AttentionShape shape_{.batch = 1,
                        .num_heads = 32,
                        .num_kv_heads = 8,
                        .q_len = 512,
                        .kv_len = 32768,
                        .head_dim = 128};
  std::optional<std::int64_t> value_dim_;
  std::string dtype_ = "float32";
};

/// "q [1, 32, 512, 128], k [1, 8, 32768, 128], v [...], float32"
std::string shape_text(const AttentionShape& shape);
nlohmann::ordered_json as_json(const AttentionShape& shape);

/// Query-key pairs that this call computes: masks given as tensors left out.
double visible_pairs(const AttentionShape& shape, const AttentionOptions& options);

}  // namespace keyfold::cli

// One case of attention: a row of a test's table, its random inputs, and the call they make.
#pragma once

#include <iosfwd>
#include <optional>
#include <vector>

#include "keyfold/keyfold.hpp"
#include "support/random.hpp"
#include "support/tensor.hpp"

namespace keyfold::test {

/// The dtypes with which the i-th row of a table of sizes is tested: all; at the tiny scale one, as
/// software GPUs compile for seconds for each.
std::vector<DType> dtypes_of(std::size_t i);

enum class Data {
  kNormal,      ///< independent normal values
  kOutliers,    ///< every fiftieth value is 30 times as large
  kAscending,   ///< every key scores higher than the one before
  kDescending,  ///< every key scores lower
  kNeedle,      ///< one key scores far above all others
  kEqual,       ///< all keys score 0
};
enum class Mask { kNone, kBool, kAdditive, kAdditiveSameDType };

struct Case {
  DType dtype = DType::kFloat32;
  std::int64_t batch = 1, num_heads = 2, num_kv_heads = 1, q_len = 8, kv_len = 100, head_dim = 64;
  std::int64_t value_dim = 0;  // 0: head_dim
  bool causal = false;
  std::optional<std::int64_t> q_offset = {};
  Window window = {};
  std::optional<float> scale = {}, softcap = {};
  Mask mask = Mask::kNone;
  std::array<bool, 4> mask_broadcast = {};
  bool sinks = false;
  std::vector<std::int64_t> kv_lens = {};
  Layout layout = Layout::kDense;
  Data data = Data::kNormal;

  AttentionShape shape() const;
};
std::ostream& operator<<(std::ostream& to, const Case& c);

/// A call without its outputs: views on somebody's memory.
struct Call {
  TensorView q, k, v;
  AttentionOptions options;

  AttentionShape shape() const;
  Dims out_sizes() const { return {q.sizes[0], q.sizes[1], q.sizes[2], v.sizes[3]}; }
  /// Batch entry `b` alone.
  Call batch_entry(std::int64_t b) const;
  /// Query rows [begin, end) of a call with one batch entry, at their positions.
  Call rows(std::int64_t begin, std::int64_t end) const;
  /// Keys [begin, end) as a call of its own, queries at their positions.
  Call keys(std::int64_t begin, std::int64_t end) const;
};
/// Elements [begin, end) of one axis; a broadcast axis (size 1) stays as it is.
TensorView slice(TensorView t, std::size_t axis, std::int64_t begin, std::int64_t end);

/// Random inputs of a case; what no query may see holds NaN and huge values.
class Inputs {
 public:
  Inputs(const Case& c, Rng& rng);
  Call call() const;

  Case c;
  Tensor q, k, v, mask, sinks;

 private:
  void fill_keys(Rng& rng);
  void fill_mask(Rng& rng);
};

}  // namespace keyfold::test

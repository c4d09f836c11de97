// The formula as plain loops, once for float64 and for the naive float32.
#include "support/reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.hpp"
#include "support/tensor.hpp"

// The loops that take the time. They are not what is tested, so sanitizers leave them alone; where
// the processor has AVX2 they are twice as fast with the same bits, as AVX2 fuses no products.
#if defined(__SANITIZE_THREAD__) || defined(__clang__)
// NOLINTNEXTLINE(bugprone-macro-parentheses)
#define KEYFOLD_HOT_LOOP __attribute__((no_sanitize("address", "undefined", "thread")))
#elif defined(__x86_64__) && defined(__GLIBC__)
// NOLINTNEXTLINE(bugprone-macro-parentheses)
#define KEYFOLD_HOT_LOOP __attribute__((target_clones("avx2", "default")))
#else
#define KEYFOLD_HOT_LOOP
#endif

namespace keyfold::test {
namespace {

constexpr std::size_t kKeyBlock = 64;  // keys converted at a time
constexpr std::size_t kRowBatch = 16;  // rows that share converted keys
constexpr std::int64_t kFar = std::int64_t{1} << 60;

struct Range {
  std::int64_t begin = 0, end = 0;
};

/// to[d * step] = row i of a view, for every d.
template <class Real>
void load_row(const TensorView& t, std::int64_t b, std::int64_t h, std::int64_t i, Real* to,
              std::size_t step = 1) {
  const std::byte* from = core::element(t, b, h, i, 0);
  for (std::int64_t d = 0; d < t.sizes[3]; ++d)
    to[static_cast<std::size_t>(d) * step] =
        static_cast<Real>(core::load_float(from + d * t.strides[3] * size_of(t.dtype), t.dtype));
}

/// dot[j] += x * line[j] over a block of keys, and the same of the squares.
template <class Real>
KEYFOLD_HOT_LOOP void add_products(Real x, const Real* line, Real* dot, Real* squares) {
  for (std::size_t j = 0; j < kKeyBlock; ++j) {
    const Real product = x * line[j];
    dot[j] += product;
    squares[j] += product * product;
  }
}

/// sum[d] += weight * line[d], squares[d] += error^2 * line[d]^2.
template <class Real>
KEYFOLD_HOT_LOOP void add_weighted(Real weight, Real error, const Real* line, std::size_t n,
                                   Real* sum, Real* squares) {
  for (std::size_t d = 0; d < n; ++d) {
    sum[d] += weight * line[d];
    const Real product = error * line[d];
    squares[d] += product * product;
  }
}

template <class Real>
class Attention {
 public:
  Attention(const TensorView& q, const TensorView& k, const TensorView& v,
            const AttentionOptions& options, bool round, bool cuts_off)
      : q_(q), k_(k), v_(v), options_(options), round_(round), cuts_off_(cuts_off) {}

  Rows run(const std::vector<RowId>& rows) {
    Rows result;
    result.out.resize(rows.size() * static_cast<std::size_t>(v_.sizes[3]));
    result.lse.resize(rows.size());
    result.out_noise.resize(result.out.size());
    result.lse_noise.resize(result.lse.size());
    for (std::size_t i = 0; i < rows.size();) {
      std::size_t n = 1;
      while (n < kRowBatch && i + n < rows.size() && rows[i + n].batch == rows[i].batch &&
             kv_head(rows[i + n]) == kv_head(rows[i]))
        ++n;
      run_batch(&rows[i], n, result, i);
      i += n;
    }
    return result;
  }

 private:
  std::int64_t kv_head(const RowId& r) const { return r.head / (q_.sizes[1] / k_.sizes[1]); }

  Range visible(const RowId& r) const {
    const std::int64_t keys = options_.kv_lens.empty()
                                  ? k_.sizes[2]
                                  : options_.kv_lens[static_cast<std::size_t>(r.batch)];
    const std::int64_t position = options_.q_offset.value_or(keys - q_.sizes[2]) + r.row;
    Range range{0, keys};
    if (options_.causal) range.end = std::min(range.end, position + 1);
    if (options_.window.right && position < keys - 1 - *options_.window.right)
      range.end = std::min(range.end, position + *options_.window.right + 1);
    if (options_.window.left)
      range.begin = std::max<std::int64_t>(0, position - std::min(*options_.window.left, kFar));
    range.begin = std::min(range.begin, keys);
    range.end = std::max(range.end, range.begin);
    return range;
  }

  /// Adds the mask to a score; -inf where it hides the key.
  Real masked(Real score, const RowId& r, std::int64_t key) const {
    if (!options_.mask) return score;
    const TensorView& mask = *options_.mask;
    Dims i{r.batch, r.head, r.row, key};
    for (std::size_t axis = 0; axis < 4; ++axis)
      if (mask.sizes[axis] == 1) i[axis] = 0;
    const float value = load(mask, i);
    if (mask.dtype == DType::kBool) return value != 0 ? score : -kInf;
    return value == -kInf ? -kInf : score + static_cast<Real>(value);
  }

  void run_batch(const RowId* rows, std::size_t n, Rows& result, std::size_t at) const {
    const std::int64_t dim = q_.sizes[3], value_dim = v_.sizes[3];
    const Real scale = options_.scale ? static_cast<Real>(*options_.scale)
                                      : Real{1} / std::sqrt(static_cast<Real>(dim));
    Range all = visible(rows[0]);
    std::vector<Range> ranges(n);
    for (std::size_t r = 0; r < n; ++r) {
      ranges[r] = visible(rows[r]);
      all = {std::min(all.begin, ranges[r].begin), std::max(all.end, ranges[r].end)};
    }
    const std::size_t width =
        static_cast<std::size_t>(std::max<std::int64_t>(all.end - all.begin, 0));
    const std::int64_t cuts = dim / 16 + 1;  // of a sum, by a unit that cuts off
    std::vector<Real> weights(n * width, -kInf), noise(round_ ? 0 : weights.size());
    std::vector<Real> cut(noise.size());  // the part that has the same direction for all keys

    // Scores: key blocks transposed, so that each dot is one plain sum over dim in order.
    const auto dims = static_cast<std::size_t>(dim);
    std::vector<Real> queries(n * dims), keys(dims * kKeyBlock);
    for (std::size_t r = 0; r < n; ++r)
      load_row(q_, rows[r].batch, rows[r].head, rows[r].row, &queries[r * dims]);
    for (std::int64_t first = all.begin; first < all.end; first += kKeyBlock) {
      const auto count = std::min<std::int64_t>(kKeyBlock, all.end - first);
      for (std::int64_t j = 0; j < count; ++j)
        load_row(k_, rows[0].batch, kv_head(rows[0]), first + j, &keys[static_cast<std::size_t>(j)],
                 kKeyBlock);
      for (std::size_t r = 0; r < n; ++r) {
        Real dot[kKeyBlock] = {}, squares[kKeyBlock] = {};
        for (std::size_t d = 0; d < dims; ++d)
          add_products(queries[r * dims + d], &keys[d * kKeyBlock], dot, squares);
        for (std::int64_t j = 0; j < count; ++j) {
          const std::int64_t key = first + j;
          if (key < ranges[r].begin || key >= ranges[r].end) continue;
          Real score = dot[j] * scale;
          if (options_.softcap) {
            const auto cap = static_cast<Real>(*options_.softcap);
            score = cap * std::tanh(score / cap);
          }
          const auto at_key = r * width + static_cast<std::size_t>(key - all.begin);
          weights[at_key] = masked(score, rows[r], key);
          if (round_) continue;
          // A sum of dim terms as a random walk, then scale, cap, mask, exp and the division. A
          // unit that cuts off does so about every 16 terms, by up to one step, always towards 0.
          // A score may be infinite, which a softcap makes exact.
          const auto finite = [](Real x) { return std::isfinite(x) ? x : Real{0}; };
          const Real sum = finite(std::sqrt(static_cast<Real>(dim) * squares[j]));
          if (cuts_off_) {
            cut[at_key] =
                kUnit * std::abs(scale) * finite(static_cast<Real>(cuts) * std::abs(dot[j]));
          }
          noise[at_key] = kUnit * (sum * std::abs(scale) + 4 * (std::abs(weights[at_key]) + 2));
        }
      }
    }
    for (std::size_t r = 0; r < n; ++r)
      result.lse[at + r] = softmax(weights.data() + r * width, width, rows[r]);

    std::vector<Real> line(static_cast<std::size_t>(value_dim)), sums(n * line.size());
    std::vector<Real> out_squares(sums.size());
    std::vector<double> lse_cut(n);
    for (std::size_t j = 0; j < width; ++j) {
      const std::int64_t key = all.begin + static_cast<std::int64_t>(j);
      load_row(v_, rows[0].batch, kv_head(rows[0]), key, line.data());
      for (std::size_t r = 0; r < n; ++r) {
        const Real weight = weights[r * width + j];
        if (weight == 0) continue;
        const std::size_t of = r * width + j, to = r * line.size();
        const Real error = round_ ? 0 : weight * noise[of], bias = round_ ? 0 : weight * cut[of];
        result.lse_noise[at + r] += static_cast<double>(error * error);
        lse_cut[r] += static_cast<double>(bias);
        add_weighted(weight, error + bias, line.data(), line.size(), &sums[to], &out_squares[to]);
      }
    }
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const std::size_t to = at * line.size() + i;
      result.out[to] = round_ ? static_cast<double>(rounded(static_cast<float>(sums[i]), q_.dtype))
                              : static_cast<double>(sums[i]);
      result.out_noise[to] = static_cast<double>(std::sqrt(out_squares[i]));
    }
    // log(l), at most that of the keys, is rounded before m is added to it.
    const double log_noise = 0x1p-24 * std::log(std::max<double>(1, static_cast<double>(width)));
    for (std::size_t r = 0; r < n; ++r) {
      double& noise_of = result.lse_noise[at + r];
      noise_of = std::sqrt(noise_of + log_noise * log_noise) + lse_cut[r];
    }
  }

  /// Scores to probabilities, in place; returns the logsumexp.
  double softmax(Real* scores, std::size_t width, const RowId& row) const {
    Real sink = -kInf;
    if (options_.sinks) sink = static_cast<Real>(load(*options_.sinks, {0, row.head, 0, 0}));
    Real top = sink;
    for (std::size_t j = 0; j < width; ++j) top = std::max(top, scores[j]);
    bool empty = true;
    Real sum = sink == -kInf ? Real{0} : std::exp(sink - top);
    for (std::size_t j = 0; j < width; ++j) {
      if (scores[j] == -kInf) {
        scores[j] = 0;
        continue;
      }
      empty = false;
      scores[j] = std::exp(scores[j] - top);
      if (static_cast<float>(scores[j]) == 0) scores[j] = 0;
      sum += scores[j];
    }
    if (empty) return static_cast<double>(sink);
    for (std::size_t j = 0; j < width; ++j) {
      scores[j] /= sum;
      if (round_) scores[j] = static_cast<Real>(rounded(static_cast<float>(scores[j]), q_.dtype));
    }
    return static_cast<double>(std::log(sum) + top);
  }

  static constexpr Real kUnit = Real{0x1p-24};  // float32's
  static constexpr Real kInf = std::numeric_limits<Real>::infinity();
  const TensorView &q_, &k_, &v_;
  const AttentionOptions& options_;
  const bool round_, cuts_off_;
};

}  // namespace

std::vector<RowId> all_rows(const TensorView& q) {
  std::vector<RowId> rows;
  for (std::int64_t b = 0; b < q.sizes[0]; ++b)
    for (std::int64_t h = 0; h < q.sizes[1]; ++h)
      for (std::int64_t i = 0; i < q.sizes[2]; ++i) rows.push_back({b, h, i});
  return rows;
}

Rows reference(const TensorView& q, const TensorView& k, const TensorView& v,
               const AttentionOptions& options, const std::vector<RowId>& rows, bool cuts_off) {
  return Attention<double>(q, k, v, options, false, cuts_off).run(rows);
}

Rows naive(const TensorView& q, const TensorView& k, const TensorView& v,
           const AttentionOptions& options, const std::vector<RowId>& rows) {
  return Attention<float>(q, k, v, options, true, false).run(rows);
}

}  // namespace keyfold::test

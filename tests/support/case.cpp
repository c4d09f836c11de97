// One case of attention: a row of a test's table, its random inputs, and the call they make.
#include "support/case.hpp"

#include <cmath>
#include <ostream>

#include "core/half.hpp"

namespace keyfold::test {
namespace {

const char* name_of(Data data) {
  switch (data) {
    case Data::kNormal: return "normal";
    case Data::kOutliers: return "outliers";
    case Data::kAscending: return "ascending";
    case Data::kDescending: return "descending";
    case Data::kNeedle: return "needle";
    case Data::kEqual: return "equal";
  }
  return "unknown";
}

const char* name_of(Mask mask) {
  switch (mask) {
    case Mask::kNone: return "none";
    case Mask::kBool: return "bool";
    case Mask::kAdditive: return "float32";
    case Mask::kAdditiveSameDType: return "same dtype";
  }
  return "unknown";
}

}  // namespace

std::vector<DType> dtypes_of(std::size_t i) {
  std::vector<DType> all = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  if (scale() == Scale::kTiny) return {all[i % all.size()]};
  return all;
}

AttentionShape Case::shape() const {
  return {batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim ? value_dim : head_dim,
          dtype};
}

std::ostream& operator<<(std::ostream& to, const Case& c) {
  to << keyfold::name_of(c.dtype) << " batch " << c.batch << " heads " << c.num_heads << "/"
     << c.num_kv_heads << " q_len " << c.q_len << " kv_len " << c.kv_len << " head_dim "
     << c.head_dim << "/" << c.shape().value_dim << " " << name_of(c.data) << " "
     << test::name_of(c.layout);
  if (c.causal) to << " causal";
  if (c.q_offset) to << " q_offset " << *c.q_offset;
  if (c.window.left) to << " left " << *c.window.left;
  if (c.window.right) to << " right " << *c.window.right;
  if (c.scale) to << " scale " << *c.scale;
  if (c.softcap) to << " softcap " << *c.softcap;
  if (c.mask != Mask::kNone) {
    to << " mask " << name_of(c.mask) << " broadcast ";
    for (const bool b : c.mask_broadcast) to << b;
  }
  if (c.sinks) to << " sinks";
  if (!c.kv_lens.empty()) to << " kv_lens";
  for (const std::int64_t n : c.kv_lens) to << " " << n;
  return to;
}

TensorView slice(TensorView t, std::size_t axis, std::int64_t begin, std::int64_t end) {
  if (t.sizes[axis] == 1 && end > 1) return t;
  Dims first{};
  first[axis] = begin;
  t.data = core::element(t, first[0], first[1], first[2], first[3]);
  t.sizes[axis] = end - begin;
  return t;
}

AttentionShape Call::shape() const {
  return {q.sizes[0], q.sizes[1], k.sizes[1], q.sizes[2],
          k.sizes[2], q.sizes[3], v.sizes[3], q.dtype};
}

Call Call::batch_entry(std::int64_t b) const {
  Call one = *this;
  one.q = slice(q, 0, b, b + 1);
  one.k = slice(k, 0, b, b + 1);
  one.v = slice(v, 0, b, b + 1);
  if (options.mask) one.options.mask = slice(*options.mask, 0, b, b + 1);
  if (!options.kv_lens.empty())
    one.options.kv_lens = options.kv_lens.subspan(static_cast<std::size_t>(b), 1);
  return one;
}

Call Call::rows(std::int64_t begin, std::int64_t end) const {
  Call part = *this;
  const std::int64_t keys = options.kv_lens.empty() ? k.sizes[2] : options.kv_lens[0];
  part.q = slice(q, 2, begin, end);
  part.options.q_offset = options.q_offset.value_or(keys - q.sizes[2]) + begin;
  if (options.mask) part.options.mask = slice(*options.mask, 2, begin, end);
  return part;
}

Call Call::keys(std::int64_t begin, std::int64_t end) const {
  Call part = *this;
  part.k = slice(k, 2, begin, end);
  part.v = slice(v, 2, begin, end);
  part.options.q_offset = options.q_offset.value_or(k.sizes[2] - q.sizes[2]) - begin;
  if (options.mask) part.options.mask = slice(*options.mask, 3, begin, end);
  return part;
}

Inputs::Inputs(const Case& which, Rng& rng) : c(which) {
  const AttentionShape s = c.shape();
  q = Tensor(s.dtype, {s.batch, s.num_heads, s.q_len, s.head_dim},
             c.layout == Layout::kRepeatKeys ? Layout::kDense : c.layout);
  k = Tensor(s.dtype, {s.batch, s.num_kv_heads, s.kv_len, s.head_dim}, c.layout);
  v = Tensor(s.dtype, {s.batch, s.num_kv_heads, s.kv_len, s.value_dim},
             c.layout == Layout::kRepeatKeys ? Layout::kDense : c.layout);
  const float outlier = c.data == Data::kOutliers ? 30.0f : 1.0f;
  const auto value = [&] { return rng.normal() * (rng.one_in(50) ? outlier : 1.0f); };
  v.fill(value);
  if (c.data == Data::kNormal || c.data == Data::kOutliers) {
    q.fill(value);
    k.fill(value);
  } else {
    fill_keys(rng);
  }
  for (std::int64_t b = 0; b < (c.layout == Layout::kRepeatKeys || c.kv_lens.empty() ? 0 : s.batch);
       ++b) {
    for (std::int64_t j = c.kv_lens[static_cast<std::size_t>(b)]; j < s.kv_len; ++j) {
      for (std::int64_t h = 0; h < s.num_kv_heads; ++h) {
        for (std::int64_t d = 0; d < s.head_dim; ++d) k.set({b, h, j, d}, d % 2 ? kNaN : kInf);
        for (std::int64_t d = 0; d < s.value_dim; ++d) v.set({b, h, j, d}, d % 2 ? kInf : kNaN);
      }
    }
  }
  if (c.mask != Mask::kNone) fill_mask(rng);
  if (c.sinks) {
    sinks = Tensor(rng.one_in(2) ? s.dtype : DType::kFloat32, {1, s.num_heads, 1, 1});
    sinks.fill([&] { return 2 * rng.normal(); });
  }
}

/// Queries near one direction; keys along it, by their position.
void Inputs::fill_keys(Rng& rng) {
  const AttentionShape s = c.shape();
  const float unit = 1 / std::sqrt(static_cast<float>(s.head_dim));
  q.fill([&] { return 1 + 0.1f * rng.normal(); });
  const std::int64_t needle = rng.between(0, std::max<std::int64_t>(0, s.kv_len - 1));
  k.each([&](const Dims& i) {
    const float place = static_cast<float>(i[2] + 1) / static_cast<float>(s.kv_len);
    switch (c.data) {
      case Data::kAscending: return k.set(i, 12 * place * unit);
      case Data::kDescending: return k.set(i, 12 * (1 - place) * unit);
      case Data::kNeedle: return k.set(i, i[2] == needle ? 20 * unit : 0.1f * unit * rng.normal());
      default: return k.set(i, 0);
    }
  });
}

void Inputs::fill_mask(Rng& rng) {
  const AttentionShape s = c.shape();
  Dims sizes{s.batch, s.num_heads, s.q_len, s.kv_len};
  for (std::size_t axis = 0; axis < 4; ++axis)
    if (c.mask_broadcast[axis]) sizes[axis] = 1;
  const DType dtype = c.mask == Mask::kBool       ? DType::kBool
                      : c.mask == Mask::kAdditive ? DType::kFloat32
                                                  : s.dtype;
  mask = Tensor(dtype, sizes, c.layout == Layout::kRepeatKeys ? Layout::kDense : c.layout);
  // A third of the keys is hidden, here and there a whole row.
  std::int64_t hide_row = -1;
  mask.each([&](const Dims& i) {
    if (i[3] == 0) hide_row = rng.one_in(8) ? i[2] : -1;
    const bool hidden = i[2] == hide_row || rng.one_in(3);
    mask.set(i, c.mask == Mask::kBool ? !hidden : hidden ? -kInf : 2 * rng.normal());
  });
}

Call Inputs::call() const {
  Call call{q.view(), k.view(), v.view(), {}};
  AttentionOptions& o = call.options;
  o.scale = c.scale;
  o.causal = c.causal;
  o.q_offset = c.q_offset;
  o.window = c.window;
  o.softcap = c.softcap;
  if (c.mask != Mask::kNone) o.mask = mask.view();
  if (c.sinks) o.sinks = sinks.view();
  o.kv_lens = c.kv_lens;
  return call;
}

}  // namespace keyfold::test

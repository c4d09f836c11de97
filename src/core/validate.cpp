// Checks of arguments.
#include "core/validate.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "core/device_memory.hpp"
#include "core/half.hpp"

namespace keyfold::core {
namespace {

std::string text(const Dims& dims) {
  std::string result = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) {
    result += (i ? ", " : "") + std::to_string(dims[i]);
  }
  return result + "]";
}

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) {
  throw InvalidArgument(name, "expected " + expected + ", got " + got);
}

void check_dtype(const char* name, DType got, DType expected) {
  if (got != expected)
    fail(name, "dtype " + std::string(name_of(expected)), std::string(name_of(got)));
}

void check_float_dtype(const char* name, DType dtype) {
  if (dtype != DType::kFloat32 && dtype != DType::kFloat16 && dtype != DType::kBFloat16) {
    fail(name, "dtype float32, float16 or bfloat16", std::string(name_of(dtype)));
  }
}

/// Positions and window widths beyond this could overflow when they are added.
constexpr std::int64_t kMaxPosition = kUnknownLength;

void check_position(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least || value > kMaxPosition) {
    fail(name, "a value from " + std::to_string(least) + " to 2^60", std::to_string(value));
  }
}

void check_shape(const AttentionShape& s) {
  const auto at_least = [](const char* name, std::int64_t value, std::int64_t least) {
    check_position(name, value, least);
  };
  at_least("batch", s.batch, 1);
  at_least("num_heads", s.num_heads, 1);
  at_least("num_kv_heads", s.num_kv_heads, 1);
  at_least("q_len", s.q_len, 1);
  at_least("kv_len", s.kv_len, 0);
  at_least("head_dim", s.head_dim, 1);
  at_least("value_dim", s.value_dim, 1);
  check_float_dtype("dtype", s.dtype);
  if (s.num_heads % s.num_kv_heads != 0) {
    fail("num_heads", "a multiple of num_kv_heads = " + std::to_string(s.num_kv_heads),
         std::to_string(s.num_heads));
  }
  std::int64_t rows = 0, elements = 0;
  if (__builtin_mul_overflow(s.batch, s.num_heads, &rows) ||
      __builtin_mul_overflow(rows, s.q_len, &rows) ||
      __builtin_mul_overflow(rows, std::max(s.head_dim, s.value_dim), &elements) ||
      __builtin_mul_overflow(elements, 16, &elements)) {
    fail("q", "batch * num_heads * q_len * dim within 63 bits",
         text({s.batch, s.num_heads, s.q_len, std::max(s.head_dim, s.value_dim)}));
  }
}

void check_mask(Problem& problem, const TensorView& mask, bool has_data) {
  const AttentionShape& s = problem.shape;
  if (mask.dtype != DType::kBool && mask.dtype != DType::kFloat32 && mask.dtype != s.dtype) {
    fail("mask", "dtype bool, float32 or " + std::string(name_of(s.dtype)),
         std::string(name_of(mask.dtype)));
  }
  const Dims full{s.batch, s.num_heads, s.q_len, s.kv_len};
  TensorView expanded = mask;
  for (std::size_t i = 0; i < full.size(); ++i) {
    // A stream's length is not known: its mask says how many keys may come.
    const bool open_end = i == 3 && s.kv_len == kUnknownLength && mask.sizes[i] != 1;
    if (mask.sizes[i] == full[i] || open_end) continue;
    if (mask.sizes[i] != 1) {
      fail("mask", "sizes that broadcast to " + text(full), text(mask.sizes));
    }
    expanded.sizes[i] = full[i];
    expanded.strides[i] = 0;
  }
  if (has_data) check_view("mask", mask, false, problem.device);
  problem.mask = expanded;
}

void read_sinks(Problem& problem, const TensorView& sinks, bool has_data) {
  const AttentionShape& s = problem.shape;
  if (sinks.dtype != DType::kFloat32 && sinks.dtype != s.dtype) {
    fail("sinks", "dtype float32 or " + std::string(name_of(s.dtype)),
         std::string(name_of(sinks.dtype)));
  }
  check_sizes("sinks", sinks, {1, s.num_heads, 1, 1});
  if (!has_data) return;
  check_view("sinks", sinks, false, problem.device);
  if (problem.device != Device{}) {
    problem.device_sinks = sinks;
    return;
  }
  for (std::int64_t h = 0; h < s.num_heads; ++h) {
    problem.sinks.push_back(load_float(element(sinks, 0, h, 0, 0), sinks.dtype));
  }
}

}  // namespace

void check_sizes(const char* name, const TensorView& view, const Dims& expected) {
  if (view.sizes != expected) fail(name, "sizes " + text(expected), text(view.sizes));
}

namespace {

/// check_view() wherever the memory is.
void check_layout(const char* name, const TensorView& view, bool written = false) {
  const std::int64_t bytes = size_of(view.dtype);
  std::int64_t last = 0, count = 1;
  for (std::size_t i = 0; i < view.sizes.size(); ++i) {
    if (view.sizes[i] < 0) fail(name, "sizes of at least 0", text(view.sizes));
    // The stride of a single element means nothing, and some libraries leave anything in it.
    if (view.strides[i] < 0 && view.sizes[i] > 1) {
      fail(name, "strides of at least 0", text(view.strides));
    }
    std::int64_t span = 0;
    if (__builtin_mul_overflow(std::max<std::int64_t>(0, view.sizes[i] - 1), view.strides[i],
                               &span) ||
        __builtin_add_overflow(last, span, &last)) {
      fail(name, "offsets within 63 bits",
           "sizes " + text(view.sizes) + " with strides " + text(view.strides));
    }
    if (view.sizes[i] == 0) count = 0;
  }
  if (last > (std::numeric_limits<std::int64_t>::max() - 16) / bytes) {
    fail(name, "byte offsets within 63 bits",
         "sizes " + text(view.sizes) + " with strides " + text(view.strides));
  }
  if (count == 0) return;
  if (view.data == nullptr) fail(name, "data", "a null pointer");
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  if (address % static_cast<std::uintptr_t>(bytes) != 0) {
    fail(name, "data aligned to " + std::to_string(bytes) + " bytes",
         "an address that is " + std::to_string(address % static_cast<std::uintptr_t>(bytes)) +
             " past a multiple");
  }
  if (!written) return;
  // Distinct addresses: from the smallest stride up, each axis steps over all that lies inside it.
  std::array<std::size_t, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(),
            [&](auto a, auto b) { return view.strides[a] < view.strides[b]; });
  std::int64_t inside = 0;  // largest offset of the axes so far
  for (const std::size_t i : order) {
    if (view.sizes[i] == 1) continue;
    if (view.strides[i] <= inside) {
      fail(name, "strides that give each element memory of its own",
           "sizes " + text(view.sizes) + " with strides " + text(view.strides));
    }
    inside += (view.sizes[i] - 1) * view.strides[i];
  }
}

}  // namespace

std::string text(const Device& device) {
  if (device.type == DeviceType::kCpu) return "host memory";
  return "memory on CUDA device " + std::to_string(device.index);
}

void check_device(const char* name, const TensorView& view, const Device& where) {
  if (view.device == where) return;
  fail(name, where == Device{} ? text(where) : text(where) + ", where q is", text(view.device));
}

void check_view(const char* name, const TensorView& view, bool written, const Device& where) {
  check_layout(name, view, written);
  check_device(name, view, where);
  if (where == Device{}) check_on_host(name, view.data);
}

AttentionShape check_query(const TensorView& q) {
  check_float_dtype("q", q.dtype);
  for (const std::int64_t size : q.sizes) {
    if (size < 1)
      fail("q", "sizes [batch, num_heads, q_len, head_dim] of at least 1", text(q.sizes));
  }
  check_view("q", q, false, q.device);
  AttentionShape shape{.batch = q.sizes[0],
                       .num_heads = q.sizes[1],
                       .num_kv_heads = q.sizes[1],
                       .q_len = q.sizes[2],
                       .kv_len = 0,
                       .head_dim = q.sizes[3],
                       .value_dim = 1,
                       .dtype = q.dtype};
  check_shape(shape);
  shape.num_kv_heads = shape.value_dim = 0;
  return shape;
}

std::int64_t check_keys(const AttentionShape& shape, const TensorView& k, const TensorView& v,
                        const Device& where) {
  check_device("k", k, where);
  check_device("v", v, where);
  check_dtype("k", k.dtype, shape.dtype);
  check_dtype("v", v.dtype, shape.dtype);
  check_sizes("k", k, {shape.batch, shape.num_kv_heads, k.sizes[2], shape.head_dim});
  check_sizes("v", v, {shape.batch, shape.num_kv_heads, k.sizes[2], shape.value_dim});
  check_layout("k", k);
  check_layout("v", v);
  return k.sizes[2];
}

AttentionShape check_call(const TensorView& q, const TensorView& k, const TensorView& v) {
  AttentionShape shape = check_query(q);
  shape.num_kv_heads = k.sizes[1];
  shape.value_dim = v.sizes[3];
  shape.kv_len = k.sizes[2];
  if (shape.num_kv_heads < 1) fail("k", "at least 1 head", text(k.sizes));
  if (shape.value_dim < 1) fail("v", "a value_dim of at least 1", text(v.sizes));
  check_shape(shape);
  check_keys(shape, k, v, q.device);
  return shape;
}

void check_output(const AttentionShape& s, const MutableTensorView& out,
                  const std::optional<MutableTensorView>& lse, const Device& where) {
  check_dtype("out", out.dtype, s.dtype);
  check_sizes("out", out, {s.batch, s.num_heads, s.q_len, s.value_dim});
  check_view("out", out, true, where);
  if (!lse) return;
  check_dtype("lse", lse->dtype, DType::kFloat32);
  check_sizes("lse", *lse, {s.batch, s.num_heads, s.q_len, 1});
  check_view("lse", *lse, true, where);
}

void check_state(const AttentionShape& s, const StateView& state, bool written) {
  const auto check = [&](const char* name, const MutableTensorView& view, std::int64_t dim) {
    check_dtype(name, view.dtype, DType::kFloat32);
    check_sizes(name, view, {s.batch, s.num_heads, s.q_len, dim});
    check_view(name, view, written);
  };
  check("m", state.m, 1);
  check("l", state.l, 1);
  check("o", state.o, s.value_dim);
}

Problem make_problem(const AttentionShape& shape, const TensorView* q,
                     const AttentionOptions& options) {
  check_shape(shape);
  const bool has_data = q != nullptr;
  Problem p;
  p.shape = shape;
  if (has_data) {
    p.q = *q;
    p.device = q->device;
    p.stream = options.run.stream;
    if (p.stream != nullptr && p.device == Device{}) {
      fail("stream", "tensors on a CUDA device, whose stream it is", text(p.device));
    }
  }

  p.scale = options.scale.value_or(
      static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim))));
  if (!std::isfinite(p.scale)) fail("scale", "a finite number", std::to_string(p.scale));
  if (options.softcap) {
    p.softcap = *options.softcap;
    if (!(std::isfinite(p.softcap) && p.softcap > 0)) {
      fail("softcap", "a finite number above 0", std::to_string(p.softcap));
    }
  }
  if (options.window.left) check_position("window.left", *options.window.left, 0);
  if (options.window.right) check_position("window.right", *options.window.right, 0);
  if (options.q_offset) check_position("q_offset", *options.q_offset, -kMaxPosition);
  p.window_left = options.window.left;
  p.window_right = options.window.right;
  if (options.causal) p.window_right = 0;

  p.key_limit.assign(static_cast<std::size_t>(shape.batch), shape.kv_len);
  if (!options.kv_lens.empty()) {
    check_on_host("kv_lens", options.kv_lens.data());
    if (static_cast<std::int64_t>(options.kv_lens.size()) != shape.batch) {
      fail("kv_lens", "one length per batch entry, " + std::to_string(shape.batch),
           std::to_string(options.kv_lens.size()));
    }
    for (std::size_t b = 0; b < options.kv_lens.size(); ++b) {
      const std::int64_t length = options.kv_lens[b];
      if (length < 0 || length > shape.kv_len) {
        fail("kv_lens", "lengths from 0 to kv_len = " + std::to_string(shape.kv_len),
             std::to_string(length) + " for batch entry " + std::to_string(b));
      }
      p.key_limit[b] = length;
    }
  }
  if (options.device_kv_lens != nullptr) {
    if (!options.kv_lens.empty()) fail("device_kv_lens", "no kv_lens beside it", "both");
    if (has_data && p.device == Device{}) {
      fail("device_kv_lens", "tensors on the CUDA device where it is", text(p.device));
    }
    p.device_kv_lens = options.device_kv_lens;
  }
  p.q_offset_given = options.q_offset.has_value();
  const bool needs_position = p.window_left || p.window_right;
  if (needs_position && !options.q_offset && shape.kv_len == kUnknownLength &&
      options.kv_lens.empty()) {
    fail("q_offset", "the position of query row 0, as the number of keys is not known yet",
         "causal or window without q_offset");
  }
  for (const std::int64_t limit : p.key_limit) {
    p.q_offset.push_back(options.q_offset.value_or(limit - shape.q_len));
  }
  if (options.mask) check_mask(p, *options.mask, has_data);
  if (options.sinks) read_sinks(p, *options.sinks, has_data);
  return p;
}

}  // namespace keyfold::core

// AttentionOptions as Python makes them.
#include "options.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <tuple>

namespace keyfold::python {
namespace {

using Int = std::optional<std::int64_t>;
using Real = std::optional<double>;

std::optional<float> narrowed(Real value) {
  return value ? std::optional(static_cast<float>(*value)) : std::nullopt;
}

std::optional<int> narrowed(Int value, const char* name) {
  if (!value) return std::nullopt;
  if (*value < std::numeric_limits<int>::min() || *value > std::numeric_limits<int>::max()) {
    throw InvalidArgument(name, "expected a number of 32 bits, got " + std::to_string(*value));
  }
  return static_cast<int>(*value);
}

void make_options(Options* self, Real scale, const nb::object& mask, bool causal, Int q_offset,
                  Int window_left, Int window_right, Real softcap, const nb::object& sinks,
                  std::vector<std::int64_t> kv_lens, const nb::object& device_kv_lens,
                  Array::Stream stream, std::optional<std::string> backend, Real budget_ms,
                  Int chunk_size, Int chunk_threshold, Int max_scratch_bytes, Int num_threads) {
  Options options;
  AttentionOptions& a = options.attention;
  a.scale = narrowed(scale);
  a.causal = causal;
  a.q_offset = q_offset;
  a.window = {window_left, window_right};
  a.softcap = narrowed(softcap);
  options.stream = stream;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has it as a number.
  a.run.stream = reinterpret_cast<void*>(stream.value_or(0));
  if (!mask.is_none()) {
    options.mask = Array::to_read(mask, "mask", stream);
    a.mask = options.mask->view_trailing();
  }
  if (!sinks.is_none()) {
    options.sinks = Array::to_read(sinks, "sinks", stream);
    a.sinks = options.sinks->view(kSinksAxes);
  }
  options.kv_lens = std::move(kv_lens);
  if (!device_kv_lens.is_none()) {
    std::tie(options.device_kv_lens, a.device_kv_lens) =
        device_lengths(device_kv_lens, stream.value_or(0));
  }
  a.run.backend = std::move(backend);
  a.run.budget_ms = budget_ms;
  a.run.chunk_size = chunk_size;
  a.run.chunk_threshold = chunk_threshold;
  a.run.max_scratch_bytes = max_scratch_bytes;
  a.run.num_threads = narrowed(num_threads, "num_threads");
  new (self) Options(std::move(options));
}

}  // namespace

AttentionOptions Options::for_call() const {
  AttentionOptions options = attention;
  options.kv_lens = kv_lens;
  return options;
}

void bind_options(nb::module_& module) {
  using nb::arg;
  nb::class_<Options>(module, "Options")
      .def("__init__", make_options, nb::kw_only(), arg("scale").none(), arg("mask").none(),
           arg("causal"), arg("q_offset").none(), arg("window_left").none(),
           arg("window_right").none(), arg("softcap").none(), arg("sinks").none(), arg("kv_lens"),
           arg("device_kv_lens").none(), arg("stream").none(), arg("backend").none(),
           arg("budget_ms").none(), arg("chunk_size").none(), arg("chunk_threshold").none(),
           arg("max_scratch_bytes").none(), arg("num_threads").none());
}

}  // namespace keyfold::python

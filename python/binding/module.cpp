// keyfold._keyfold: the functions that the package's Python modules call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <keyfold/keyfold.hpp>
#include <limits>

#include "array.hpp"
#include "gil.hpp"
#include "options.hpp"
#include "ranks.hpp"
#include "records.hpp"
#include "state.hpp"
#include "store.hpp"
#include "watcher.hpp"

namespace keyfold::python {
namespace {

/// Raises what keyfold threw as the exception of keyfold/_errors.py, with more `arguments` than the
/// message where that takes them.
template <class... Arguments>
void raise(const char* exception, const char* what, const Arguments&... arguments) {
  const nb::object message =
      nb::steal(PyUnicode_DecodeUTF8(what, static_cast<Py_ssize_t>(std::strlen(what)), "replace"));
  const nb::object type = nb::module_::import_("keyfold._errors").attr(exception);
  PyErr_SetObject(type.ptr(), type(message, arguments...).ptr());
}

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const InvalidArgument& error) {
    raise("InvalidArgument", error.what());
  } catch (const IoError& error) {
    raise("IoError", error.what());
  } catch (const PeerError& error) {
    raise("PeerError", error.what(), error.ranks());
  } catch (const RunError& error) {
    switch (error.code()) {
      case ErrorCode::kUnsupported: return raise("UnsupportedError", error.what());
      case ErrorCode::kOutOfMemory: return raise("OutOfMemoryError", error.what());
      case ErrorCode::kDeviceFailure: return raise("DeviceError", error.what());
      default: return raise("InternalError", error.what());
    }
  }
}

/// Of lengths on a device the library has the address only.
void check_lengths(const Options& options, const TensorView& q) {
  if (options.attention.device_kv_lens == nullptr) return;
  const auto count = static_cast<std::int64_t>(options.device_kv_lens.shape_ptr()[0]);
  if (count != q.sizes[0]) {
    throw InvalidArgument("kv_lens", "expected one length per batch entry, " +
                                         std::to_string(q.sizes[0]) + ", got " +
                                         std::to_string(count));
  }
  const int index = static_cast<int>(options.device_kv_lens.device_id());
  if (q.device != Device{DeviceType::kCuda, index}) {
    throw InvalidArgument(
        "kv_lens", "expected lengths where q is, got some on CUDA device " + std::to_string(index));
  }
}

void attention(const nb::object& q, const nb::object& k, const nb::object& v, const nb::object& out,
               const nb::object& lse, const Options& options, const nb::object& progress) {
  const Array::Stream stream = options.stream;
  const Array queries = Array::to_read(q, "q", stream), keys = Array::to_read(k, "k", stream),
              values = Array::to_read(v, "v", stream), result = Array::to_write(out, "out", stream);
  const MutableTensorView q_view = queries.view(), k_view = keys.view(), v_view = values.view(),
                          out_view = result.view();
  AttentionOptions call = options.for_call();
  std::optional<Array> sums;
  check_lengths(options, q_view);
  if (!lse.is_none()) {
    sums = Array::to_write(lse, "lse", stream);
    call.lse = sums->view(kLseAxes);
  }
  Watcher watcher(progress);
  call.run.progress = std::ref(watcher);
  const GilReleased no_gil;
  keep_report(scaled_dot_product_attention(q_view, k_view, v_view, out_view, call));
}

/// out and lse are dense: they become the empty state, which takes a and then b.
void merge(const nb::object& out_a, const nb::object& lse_a, const nb::object& out_b,
           const nb::object& lse_b, const nb::object& out, const nb::object& lse) {
  const Array a = Array::to_read(out_a, "out_a"), a_sums = Array::to_read(lse_a, "lse_a"),
              b = Array::to_read(out_b, "out_b"), b_sums = Array::to_read(lse_b, "lse_b"),
              result = Array::to_write(out, "out"), sums = Array::to_write(lse, "lse");
  const MutableTensorView a_view = a.view(), a_lse = a_sums.view(kLseAxes), b_view = b.view(),
                          b_lse = b_sums.view(kLseAxes), out_view = result.view(),
                          lse_view = sums.view(kLseAxes);
  const GilReleased no_gil;
  const std::int64_t rows = lse_view.sizes[0] * lse_view.sizes[1] * lse_view.sizes[2];
  std::memset(out_view.data, 0,
              static_cast<std::size_t>(rows * out_view.sizes[3] * size_of(out_view.dtype)));
  std::fill_n(static_cast<float*>(lse_view.data), rows, -std::numeric_limits<float>::infinity());
  merge_state(out_view, lse_view, a_view, a_lse);
  merge_state(out_view, lse_view, b_view, b_lse);
}

Fields make_plan(std::int64_t batch, std::int64_t num_heads, std::int64_t num_kv_heads,
                 std::int64_t q_len, std::int64_t kv_len, std::int64_t head_dim,
                 std::int64_t value_dim, std::string_view dtype, const Options& options) {
  return as_tuple(
      plan({batch, num_heads, num_kv_heads, q_len, kv_len, head_dim, value_dim, dtype_named(dtype)},
           options.for_call()));
}

}  // namespace
}  // namespace keyfold::python

NB_MODULE(_keyfold, module) {
  using namespace keyfold::python;
  using nb::arg;
  nb::set_leak_warnings(false);  // a daemon thread at exit is no leak, and the library never prints
  nb::register_exception_translator(translate);
  module.attr("version") = KEYFOLD_VERSION;
  bind_options(module);
  bind_ranks(module);
  bind_state(module);
  bind_store(module);
  module.def("attention", attention, arg("q"), arg("k"), arg("v"), arg("out"), arg("lse").none(),
             arg("options"), arg("progress").none());
  module.def("merge_state", merge, arg("out_a"), arg("lse_a"), arg("out_b"), arg("lse_b"),
             arg("out"), arg("lse"));
  module.def(
      "shape_and_dtype",
      [](const nb::object& array, const char* name, const Array::Stream stream) {
        const Array held = Array::to_read(array, name, stream);
        using Shape = nb::typed<nb::tuple, int, nb::ellipsis>;
        return std::pair(Shape(nb::tuple(nb::cast(held.shape()))), keyfold::name_of(held.dtype()));
      },
      arg("array").none(), arg("name"), arg("stream").none() = nb::none());
  module.def("empty", make_empty, arg("shape"), arg("dtype"));
  module.def("plan", make_plan, arg("batch"), arg("num_heads"), arg("num_kv_heads"), arg("q_len"),
             arg("kv_len"), arg("head_dim"), arg("value_dim"), arg("dtype"), arg("options"));
  module.def("devices", [] {
    std::vector<Fields> devices;
    for (const keyfold::DeviceInfo& device : keyfold::devices()) {
      devices.push_back(as_tuple(device));
    }
    return devices;
  });
  module.def("last_report", last_report);
}

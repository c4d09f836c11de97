// open_source() and KvStore for Python.
#include "store.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/unique_ptr.h>

#include "gil.hpp"
#include "records.hpp"

namespace keyfold::python {
namespace {

class Store {
 public:
  explicit Store(KvStore store) : store_(std::move(store)) {}

  void append(const nb::object& k, const nb::object& v) {
    const Array keys = Array::to_read(k, "k"), values = Array::to_read(v, "v");
    const TensorView key_view = keys.view(), value_view = values.view();
    const OneCall turn(busy_, "store");
    const GilReleased no_gil;
    store_.append(key_view, value_view);
  }
  Fields verify() {
    const OneCall turn(busy_, "store");
    const VerifyReport report = [&] {
      const GilReleased no_gil;
      return store_.verify();
    }();
    return nb::make_tuple(report.keys, report.records, report.bytes);
  }
  void close() {
    const OneCall turn(busy_, "store");
    const GilReleased no_gil;
    store_.close();
  }
  std::int64_t size() {
    const OneCall turn(busy_, "store");
    return store_.size();
  }
  std::unique_ptr<Source> source(std::int64_t ahead_bytes, int num_threads) {
    const OneCall turn(busy_, "store");
    return std::make_unique<Source>(store_.source({ahead_bytes, num_threads}));
  }
  std::unique_ptr<Source> follow(std::optional<std::int64_t> until, std::optional<double> timeout_s,
                                 std::int64_t ahead_bytes, int num_threads) {
    const OneCall turn(busy_, "store");
    FollowOptions options;
    options.until = until;
    options.timeout_s = timeout_s;
    options.read = {ahead_bytes, num_threads};
    return Source::follow(store_, std::move(options));
  }
  const KvStore& get() const { return store_; }

 private:
  std::atomic<bool> busy_ = false;
  KvStore store_;
};

Fields as_tuple(const KeyValueShape& s) {
  return nb::make_tuple(s.batch, s.num_kv_heads, s.head_dim, s.value_dim, name_of(s.dtype));
}

Durability durability_of(bool machine) {
  return machine ? Durability::kMachine : Durability::kProcess;
}

std::unique_ptr<Store> create(const std::string& path, std::int64_t batch,
                              std::int64_t num_kv_heads, std::int64_t head_dim,
                              std::int64_t value_dim, std::string_view dtype,
                              std::optional<std::int64_t> block_len, std::int64_t max_keys,
                              bool machine) {
  const GilReleased no_gil;
  return std::make_unique<Store>(
      KvStore::create(path, {batch, num_kv_heads, head_dim, value_dim, dtype_named(dtype)},
                      {block_len, max_keys}, durability_of(machine)));
}

}  // namespace

OneCall::OneCall(std::atomic<bool>& busy, const char* what) : busy_(busy) {
  if (busy_.exchange(true)) {
    throw InvalidArgument(what, "expected one call at a time, got one while another runs");
  }
}

std::unique_ptr<Source> Source::follow(const KvStore& store, FollowOptions options) {
  std::unique_ptr<Source> source(new Source);
  options.waiting = [&waiter = source->waiter_] {
    if (waiter != nullptr) (*waiter)({});
  };
  source->source_ = store.follow(options);
  return source;
}

Report Source::attend(const nb::object& q, const nb::object& out, const nb::object& lse,
                      const Options& options, const nb::object& progress) {
  const Array queries = Array::to_read(q, "q"), result = Array::to_write(out, "out");
  const MutableTensorView q_view = queries.view(), out_view = result.view();
  AttentionOptions call = options.for_call();
  std::optional<Array> sums;
  if (!lse.is_none()) {
    sums = Array::to_write(lse, "lse");
    call.lse = sums->view(kLseAxes);
  }
  Watcher watcher(progress);
  Watcher waiter{nb::none()};
  call.run.progress = std::ref(watcher);
  const OneCall turn(busy_, "source");
  waiter_ = &waiter;
  const GilReleased no_gil;
  return scaled_dot_product_attention(q_view, *source_, out_view, call);
}

void bind_store(nb::module_& module) {
  using nb::arg;
  nb::class_<Source>(module, "Source")
      .def_prop_ro("shape", [](const Source& self) { return as_tuple(self.shape()); })
      .def_prop_ro("size", &Source::size)
      .def_prop_ro("grows", &Source::grows)
      .def(
          "attend",
          [](Source& self, const nb::object& q, const nb::object& out, const nb::object& lse,
             const Options& options, const nb::object& progress) {
            keep_report(self.attend(q, out, lse, options, progress));
          },
          arg("q"), arg("out"), arg("lse").none(), arg("options"), arg("progress").none());
  module.def(
      "open_source",
      [](const std::string& k, const std::string& v, bool blhd, std::int64_t ahead_bytes,
         int num_threads) {
        const GilReleased no_gil;
        return std::make_unique<Source>(open_source(
            k, v, blhd ? keyfold::Axes::kBLHD : keyfold::Axes::kBHLD, {ahead_bytes, num_threads}));
      },
      arg("k"), arg("v"), arg("blhd"), arg("ahead_bytes"), arg("num_threads"));
  nb::class_<Store>(module, "Store")
      .def("append", &Store::append, arg("k"), arg("v"))
      .def("verify", &Store::verify)
      .def("close", &Store::close)
      .def("source", &Store::source, arg("ahead_bytes"), arg("num_threads"))
      .def("follow", &Store::follow, arg("until").none(), arg("timeout_s").none(),
           arg("ahead_bytes"), arg("num_threads"))
      .def_prop_ro("size", &Store::size)
      .def_prop_ro("path", [](const Store& self) { return self.get().path(); })
      .def_prop_ro("shape", [](const Store& self) { return as_tuple(self.get().shape()); })
      .def_prop_ro("block_len", [](const Store& self) { return self.get().block_len(); })
      .def_prop_ro("max_keys", [](const Store& self) { return self.get().max_keys(); })
      .def_prop_ro("recovery", [](const Store& self) {
        const RecoveryReport& found = self.get().recovery();
        return Fields(nb::make_tuple(found.closed, found.dropped_keys, found.dropped_bytes));
      });
  module.def("create_store", create, arg("path"), arg("batch"), arg("num_kv_heads"),
             arg("head_dim"), arg("value_dim"), arg("dtype"), arg("block_len").none(),
             arg("max_keys"), arg("machine"));
  module.def(
      "append_to_store",
      [](const std::string& path, bool machine) {
        const GilReleased no_gil;
        return std::make_unique<Store>(KvStore::append_to(path, durability_of(machine)));
      },
      arg("path"), arg("machine"));
  module.def(
      "open_store",
      [](const std::string& path) {
        const GilReleased no_gil;
        return std::make_unique<Store>(KvStore::open(path));
      },
      arg("path"));
}

}  // namespace keyfold::python

// AttentionState for Python.
#include "state.hpp"

#include "gil.hpp"
#include "records.hpp"

namespace keyfold::python {

State::State(const nb::object& q, const Options& options, std::int64_t first_key)
    : q_(Array::to_read(q, "q")), options_(options), next_key_(first_key), state_([&] {
        AttentionOptions borrowed = options_.for_call();
        borrowed.run.progress = [this](const Progress& progress) {
          if (watcher_ != nullptr) (*watcher_)(progress);
        };
        return AttentionState(q_.view(), borrowed, first_key);
      }()) {}

State::Turn::Turn(State& state) : state_(state) {
  if (state_.busy_.exchange(true)) {
    throw InvalidArgument("state", "expected one call at a time, got one while another runs");
  }
}

State::Turn::~Turn() {
  state_.watcher_ = nullptr;
  state_.next_key_ = state_.state_.next_key();
  state_.busy_ = false;
}

void State::update(const nb::object& k, const nb::object& v, const nb::object& progress) {
  const Array keys = Array::to_read(k, "k"), values = Array::to_read(v, "v");
  const TensorView key_view = keys.view(), value_view = values.view();
  Watcher watcher(progress);
  const Turn turn(*this);
  watcher_ = &watcher;
  const GilReleased no_gil;
  state_.update(key_view, value_view);
}

void State::skip_to(std::int64_t key, const nb::object& progress) {
  Watcher watcher(progress);
  const Turn turn(*this);
  watcher_ = &watcher;
  const GilReleased no_gil;
  state_.skip_to(key);
}

void State::merge(State& other) {
  if (&other == this) {
    throw InvalidArgument("other", "expected another state, got this one");
  }
  const Turn turn(*this), other_turn(other);
  const GilReleased no_gil;
  state_.merge(std::move(other.state_));
}

Report State::finish(const nb::object& out, const nb::object& lse, const nb::object& progress) {
  const Array result = Array::to_write(out, "out");
  const MutableTensorView out_view = result.view();
  std::optional<Array> sums;
  std::optional<MutableTensorView> lse_view;
  if (!lse.is_none()) {
    sums = Array::to_write(lse, "lse");
    lse_view = sums->view(kLseAxes);
  }
  Watcher watcher(progress);
  const Turn turn(*this);
  watcher_ = &watcher;
  const GilReleased no_gil;
  return state_.finish(out_view, lse_view);
}

void State::save(const nb::object& m, const nb::object& l, const nb::object& o,
                 const nb::object& progress) {
  const Array maxima = Array::to_write(m, "m"), sums = Array::to_write(l, "l"),
              values = Array::to_write(o, "o");
  const StateView to{maxima.view(kLseAxes), sums.view(kLseAxes), values.view()};
  Watcher watcher(progress);
  const Turn turn(*this);
  watcher_ = &watcher;
  const GilReleased no_gil;
  state_.save(to);
}

void State::load(const nb::object& m, const nb::object& l, const nb::object& o,
                 std::int64_t num_kv_heads) {
  const Array maxima = Array::to_read(m, "m"), sums = Array::to_read(l, "l"),
              values = Array::to_read(o, "o");
  const StateView from{maxima.view(kLseAxes), sums.view(kLseAxes), values.view()};
  const Turn turn(*this);
  const GilReleased no_gil;
  state_.load(from, num_kv_heads);
}

void bind_state(nb::module_& module) {
  using nb::arg;
  nb::class_<State>(module, "State")
      .def(nb::init<const nb::object&, const Options&, std::int64_t>(), arg("q"), arg("options"),
           arg("first_key"))
      .def("update", &State::update, arg("k"), arg("v"), arg("progress").none())
      .def("skip_to", &State::skip_to, arg("key"), arg("progress").none())
      .def("merge", &State::merge, arg("other"))
      .def(
          "finish",
          [](State& self, const nb::object& out, const nb::object& lse,
             const nb::object& progress) { keep_report(self.finish(out, lse, progress)); },
          arg("out"), arg("lse").none(), arg("progress").none())
      .def("save", &State::save, arg("m"), arg("l"), arg("o"), arg("progress").none())
      .def("load", &State::load, arg("m").none(), arg("l").none(), arg("o").none(),
           arg("num_kv_heads"))
      .def_prop_ro("next_key", &State::next_key);
}

}  // namespace keyfold::python

// AttentionState for Python: keeps what it borrows, and serves one call at a time.
#pragma once

#include <atomic>
#include <keyfold/state.hpp>

#include "options.hpp"
#include "watcher.hpp"

namespace keyfold::python {

class State {
 public:
  State(const nb::object& q, const Options& options, std::int64_t first_key);

  void update(const nb::object& k, const nb::object& v, const nb::object& progress);
  void skip_to(std::int64_t key, const nb::object& progress);
  void merge(State& other);
  Report finish(const nb::object& out, const nb::object& lse, const nb::object& progress);
  void save(const nb::object& m, const nb::object& l, const nb::object& o,
            const nb::object& progress);
  void load(const nb::object& m, const nb::object& l, const nb::object& o,
            std::int64_t num_kv_heads);
  std::int64_t next_key() const { return next_key_; }

 private:
  /// The one call that may use a state; another thread's is refused instead of racing with it.
  class Turn {
   public:
    explicit Turn(State& state);
    ~Turn();

   private:
    State& state_;
  };

  Array q_;
  Options options_;
  Watcher* watcher_ = nullptr;  // of the call that runs
  std::atomic<bool> busy_ = false;
  std::atomic<std::int64_t> next_key_;
  AttentionState state_;
};

void bind_state(nb::module_& module);

}  // namespace keyfold::python

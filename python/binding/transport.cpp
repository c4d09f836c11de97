// Memoryviews of the driver's buffers, and requests that are polled with the GIL.
#include "transport.hpp"

#include <nanobind/stl/vector.h>

#include <numeric>
#include <utility>
#include <vector>

#include "gil.hpp"
#include "raised.hpp"

namespace keyfold::python {
namespace nb = nanobind;
namespace {

// PyBUF_READ and PyBUF_WRITE, which the limited API names from 3.11 on.
constexpr int kRead = 0x100, kWrite = 0x200;

nb::object memory(const void* data, std::int64_t bytes, int access) {
  static char nothing;  // Python wants an address for no bytes too
  void* const address = data == nullptr ? &nothing : const_cast<void*>(data);
  nb::object view = nb::steal(
      PyMemoryView_FromMemory(static_cast<char*>(address), static_cast<Py_ssize_t>(bytes), access));
  if (!view.is_valid()) throw nb::python_error();
  return view;
}
nb::object readable(const void* data, std::int64_t bytes) { return memory(data, bytes, kRead); }
nb::object writable(void* data, std::int64_t bytes) { return memory(data, bytes, kWrite); }

constexpr std::int64_t kFloat = sizeof(float);

}  // namespace

class PythonTransport::Operation : public Request {
 public:
  Operation(nb::object request, std::shared_ptr<int> under_way)
      : request_(std::move(request)), under_way_(std::move(under_way)) {
    ++*under_way_;
  }
  /// Of an operation that is given up the object is kept, as that holds what MPI may still use.
  ~Operation() override { request_.release(); }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  bool done() override {
    if (!request_.is_valid()) return true;
    const GilHeld gil;
    const bool complete = raising([this] {
      // This is where a rank waits for others: Ctrl-C must end that.
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      return nb::cast<bool>(request_.attr("Test")());
    });
    if (!complete) return false;
    request_.reset();
    --*under_way_;
    return true;
  }

 private:
  nb::object request_;  // none when done
  std::shared_ptr<int> under_way_;
};

PythonTransport::PythonTransport(nb::object operations)
    : operations_(std::move(operations)),
      rank_(nb::cast<int>(operations_.attr("rank"))),
      num_ranks_(nb::cast<int>(operations_.attr("num_ranks"))) {}

PythonTransport::~PythonTransport() {
  if (*under_way_ > 0) return;
  try {
    operations_.attr("free")();
  } catch (nb::python_error& error) {
    error.discard_as_unraisable("keyfold.mpi");
  }
}

template <class Begin>
Transport::Pending PythonTransport::begun(const Begin& begin) const {
  const GilHeld gil;
  return std::make_unique<Operation>(outliving_python(begin), under_way_);
}

Transport::Pending PythonTransport::all_gather(const void* mine, void* all, std::int64_t bytes) {
  return begun([&] {
    return operations_.attr("all_gather")(readable(mine, bytes), writable(all, bytes * num_ranks_));
  });
}

Transport::Pending PythonTransport::all_reduce(float* values, std::int64_t count,
                                               Reduction reduction) {
  return begun([&] {
    const char* const name = reduction == Reduction::kMax ? "all_reduce_max" : "all_reduce_sum";
    return operations_.attr(name)(writable(values, count * kFloat));
  });
}

Transport::Pending PythonTransport::reduce_scatter(const float* values, float* mine,
                                                   std::span<const std::int64_t> counts) {
  return begun([&] {
    const std::int64_t all = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    const std::int64_t share = counts[static_cast<std::size_t>(rank_)];
    return operations_.attr("reduce_scatter")(
        readable(values, all * kFloat), writable(mine, share * kFloat),
        std::vector<std::int64_t>(counts.begin(), counts.end()));
  });
}

Transport::Pending PythonTransport::broadcast(void* data, std::int64_t bytes, int root) {
  return begun([&] { return operations_.attr("broadcast")(writable(data, bytes), root); });
}

Transport::Pending PythonTransport::send(const void* data, std::int64_t bytes, int to, int tag) {
  return begun([&] { return operations_.attr("send")(readable(data, bytes), to, tag); });
}

Transport::Pending PythonTransport::receive(void* data, std::int64_t bytes, int from, int tag) {
  return begun([&] { return operations_.attr("receive")(writable(data, bytes), from, tag); });
}

}  // namespace keyfold::python

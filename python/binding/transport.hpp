// A Transport whose operations are those of a Python object, in practice mpi4py's.
#pragma once

#include <nanobind/nanobind.h>

#include <keyfold/transport.hpp>
#include <memory>

namespace keyfold::python {

/// Made and destroyed with the GIL held, used without it.
///
/// `operations` has the numbers `rank` and `num_ranks`, a method for each operation of Transport,
/// which takes memoryviews of bytes and gives an object whose Test() drives it on and says whether
/// it is complete, and free(), which is called at the end unless an operation is still under way.
/// What any of them raises passes through.
class PythonTransport : public Transport {
 public:
  explicit PythonTransport(nanobind::object operations);
  ~PythonTransport() override;
  PythonTransport(const PythonTransport&) = delete;
  PythonTransport& operator=(const PythonTransport&) = delete;

  int rank() const override { return rank_; }
  int num_ranks() const override { return num_ranks_; }

  Pending all_gather(const void* mine, void* all, std::int64_t bytes) override;
  Pending all_reduce(float* values, std::int64_t count, Reduction reduction) override;
  Pending reduce_scatter(const float* values, float* mine,
                         std::span<const std::int64_t> counts) override;
  Pending broadcast(void* data, std::int64_t bytes, int root) override;
  Pending send(const void* data, std::int64_t bytes, int to, int tag) override;
  Pending receive(void* data, std::int64_t bytes, int from, int tag) override;

 private:
  class Operation;
  /// The request of what begin() begins by `operations`.
  template <class Begin>
  Pending begun(const Begin& begin) const;

  nanobind::object operations_;
  int rank_, num_ranks_;
  std::shared_ptr<int> under_way_ = std::make_shared<int>(0);
};

}  // namespace keyfold::python

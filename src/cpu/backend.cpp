// The CPU backend's face to the core.
#include "cpu/backend.hpp"

#include <unistd.h>

#include <fstream>
#include <string>
#include <thread>

#include "cpu/run.hpp"

namespace keyfold::cpu {
namespace {

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const auto colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

const Kernels& kernels_of(const core::Problem& problem) {
  return selected_kernels(problem.shape.dtype, problem.shape.q_len);
}

class CpuBackend : public core::Backend {
 public:
  DeviceInfo device() const override {
    return {.backend = "cpu",
            .name = name_,
            .kernel = selected_kernels().name,
            .kernels = kernel_names(),
            .num_threads = num_threads_,
            .memory_bytes = memory_bytes_,
            .max_head_dim = kMaxDim,
            .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
            .decode_as_prefill = decode_as_prefill()};
  }

  std::string unsupported(const core::Problem& problem) const override {
    if (problem.shape.head_dim <= kMaxDim && problem.shape.value_dim <= kMaxDim) return {};
    return "head_dim " + std::to_string(problem.shape.head_dim) + " and value_dim " +
           std::to_string(problem.shape.value_dim) + " exceed " + std::to_string(kMaxDim);
  }

  core::KernelInfo kernel(const core::Problem& problem) const override {
    return {.name = kernels_of(problem).name,
            .split_len = kSplitLen,
            .row_align = 1,
            .max_in_flight = 1,
            .first_dispatch_flops = 2e8,
            .flops_per_second = 1e11};
  }

  std::int64_t scratch_bytes(const core::Problem& problem, std::int64_t groups, std::int64_t rows,
                             int num_threads) const override {
    const std::int64_t states = groups * rows * problem.group_size();
    return Layout(problem, kernels_of(problem)).total(states, num_threads) *
           static_cast<std::int64_t>(sizeof(float));
  }

  std::unique_ptr<core::Run> begin(const core::Problem& problem, const core::Block& block,
                                   int num_threads) override {
    return std::make_unique<CpuRun>(problem, block, kernels_of(problem), num_threads);
  }

 private:
  // Asked once, as these files of the system take longer than a short call on a GPU.
  std::string name_ = processor_name();
  int num_threads_ = static_cast<int>(std::thread::hardware_concurrency());
  std::int64_t memory_bytes_ = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE);
};

}  // namespace

std::shared_ptr<core::Backend> make_backend() { return std::make_shared<CpuBackend>(); }

}  // namespace keyfold::cpu

// The CUDA backend's face to the core.
#include "cuda/backend.hpp"

#include <string>
#include <utility>

#include "cuda/device_run.hpp"
#include "cuda/errors.hpp"
#include "cuda/gpu.hpp"
#include "cuda/memory.hpp"
#include "cuda/run.hpp"

namespace keyfold::cuda {
namespace {

constexpr std::int64_t kMostKeys = std::int64_t{1}
                                   << 28;  // of a chunk, as kernels count in 32 bits

std::string watchdog_of(const Traits& traits) {
  if (!traits.time_limit) return {};
#ifdef _WIN32
  return "Windows ends a GPU task after 2 s (TDR)";
#else
  return "the NVIDIA driver ends a kernel after some seconds, as a display is attached";
#endif
}

/// An eighth of what the kernel reaches, a quarter of what memory gives: calls of one dispatch need
/// not be waited for. Decode reads keys and values once for the rows of a group.
double least_flops_per_second(const core::Problem& problem, const Shapes& shapes,
                              const Traits& traits) {
  const double arithmetic = shapes.flops_per_second() / 8;
  if (!shapes.tiling().decode) return arithmetic;
  const double reuse = static_cast<double>(problem.group_size() * problem.shape.q_len);
  const double flops_per_byte = 2 * reuse / static_cast<double>(size_of(problem.shape.dtype));
  return std::min(arithmetic, traits.bytes_per_second / 4 * flops_per_byte);
}

class CudaBackend : public core::Backend {
 public:
  CudaBackend(std::string name, const Driver& driver, int ordinal)
      : name_(std::move(name)), ordinal_(ordinal), gpu_(driver, ordinal) {}

  DeviceInfo device() const override {
    const Traits& t = gpu_.traits();
    const bool usable = gpu_.missing().empty();
    return {.backend = name_,
            .name = t.name,
            .kernel = usable ? selected_kernel(t) : "none: " + gpu_.missing(),
            .kernels = usable ? kernel_names(t) : std::vector<std::string>{},
            .num_threads = 0,
            .memory_bytes = t.memory_bytes,
            .max_head_dim = kMaxHeadDim,
            .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16},
            .type = t.integrated ? "integrated GPU" : "discrete GPU",
            .driver = "CUDA " + version_text(gpu_.driver().version()) + ", compute capability " +
                      std::to_string(t.capability / 10) + "." + std::to_string(t.capability % 10),
            .watchdog = watchdog_of(t),
            .max_shared_bytes = t.max_shared_bytes,
            .subgroup_size = kWarp,
            .decode_as_prefill = false};
  }

  bool reaches(const keyfold::Device& where) const override {
    return where.type == DeviceType::kCpu || where.index == ordinal_;
  }

  void check_reaches(const char* name, const TensorView& tensor) const override {
    const auto address = reinterpret_cast<CUdeviceptr>(tensor.data);
    guard_begin(gpu_, [&](const std::shared_ptr<Device>&) {
      const auto ask = [&](CUpointer_attribute which) -> std::optional<int> {
        int value = 0;
        if (gpu_.driver().pointer_get_attribute.quietly(static_cast<void*>(&value), which,
                                                        address) != CUDA_SUCCESS) {
          return std::nullopt;
        }
        return value;
      };
      const std::optional<int> type = ask(CU_POINTER_ATTRIBUTE_MEMORY_TYPE),
                               owner = ask(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
      if (type && (type != CU_MEMORYTYPE_DEVICE || owner == ordinal_)) return;
      throw InvalidArgument(name, "expected memory on CUDA device " + std::to_string(ordinal_) +
                                      ", got an address " +
                                      (type ? "on CUDA device " + std::to_string(owner.value_or(-1))
                                            : "that CUDA does not know"));
    });
  }

  std::string unsupported(const core::Problem& problem) const override {
    if (!gpu_.missing().empty()) return gpu_.missing();
    if (problem.shape.head_dim <= kMaxHeadDim && problem.shape.value_dim <= kMaxHeadDim) return {};
    return "head_dim " + std::to_string(problem.shape.head_dim) + " and value_dim " +
           std::to_string(problem.shape.value_dim) + " exceed " + std::to_string(kMaxHeadDim);
  }

  core::KernelInfo kernel(const core::Problem& problem) const override {
    const Shapes shapes(problem, gpu_.traits());
    const gpu::Tiling tiling = shapes.tiling();
    return {.name = shapes.name(),
            .split_len = tiling.split_len,
            .row_align = std::max<std::int64_t>(1, tiling.tile_rows / problem.group_size()),
            .max_in_flight = static_cast<int>(gpu::kFrames),
            .first_dispatch_flops = 2e9,
            .least_flops_per_second = least_flops_per_second(problem, shapes, gpu_.traits()),
            .flops_per_second = shapes.flops_per_second(),
            // After a kernel's failure CUDA refuses the device until the process is started anew:
            // there is nothing to go back to.
            .checkpoint_seconds = 0};
  }

  std::int64_t scratch_bytes(const core::Problem& problem, std::int64_t groups, std::int64_t rows,
                             int) const override {
    if (problem.device != keyfold::Device{}) {
      return DeviceRun::scratch_bytes(layout(problem), groups, rows);
    }
    return layout(problem).total(groups, rows);
  }

  std::int64_t max_chunk_keys(const core::Problem& problem, const core::Block& block,
                              bool keys_on_device) const override {
    if (keys_on_device) return kMostKeys;
    return layout(problem).max_keys(block.group_end - block.group_begin,
                                    block.row_end - block.row_begin);
  }

  void warm(const core::Problem& problem) override {
    guard_begin(gpu_, [&](const std::shared_ptr<Device>& device) {
      for (const KernelSpec& spec : Shapes(problem, gpu_.traits()).all()) {
        device->modules().get(spec);
      }
      for (const KernelSpec& spec : TensorKernels::specs(problem.shape.dtype)) {
        device->modules().get(spec);
      }
    });
  }

  std::shared_ptr<core::DeviceMemory> allocate(std::int64_t bytes) override {
    if (!gpu_.missing().empty()) {
      throw RunError(ErrorCode::kUnsupported, "backend '" + name_ + "': " + gpu_.missing());
    }
    return std::make_shared<CudaMemory>(gpu_, bytes);
  }

  std::unique_ptr<core::Run> begin(const core::Problem& problem, const core::Block& block,
                                   int num_threads) override {
    if (problem.device != keyfold::Device{}) {
      return std::make_unique<DeviceRun>(gpu_, problem, block);
    }
    return std::make_unique<CudaRun>(gpu_, problem, block, num_threads);
  }

 private:
  gpu::Layout layout(const core::Problem& problem) const {
    return {problem, Shapes(problem, gpu_.traits()).tiling(), false};
  }

  std::string name_;
  int ordinal_;
  mutable Gpu gpu_;
};

}  // namespace

std::vector<std::shared_ptr<core::Backend>> make_backends() {
  std::vector<std::shared_ptr<core::Backend>> all;
  const Driver* const driver = Driver::get();
  if (driver == nullptr) return all;
  for (int i = 0; i < driver->device_count(); ++i) {
    try {
      all.push_back(std::make_shared<CudaBackend>(
          all.empty() ? "cuda" : "cuda:" + std::to_string(all.size()), *driver, i));
    } catch (const Failure&) {  // a device that cannot tell what it is
      continue;
    }
  }
  return all;
}

}  // namespace keyfold::cuda

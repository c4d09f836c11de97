// ggml's CPU flash attention behind Peer.
#include "peer.hpp"

#ifdef KEYFOLD_WITH_GGML
#include <ggml-cpu.h>
#include <ggml.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#endif

namespace keyfold::benchmarks {

#ifdef KEYFOLD_WITH_GGML
namespace {

class Ggml : public Peer {
 public:
  Ggml(const TensorView& q, const TensorView& k, const TensorView& v, int num_threads)
      : memory_(std::size_t{1} << 20),
        context_(ggml_init({memory_.size(), memory_.data(), true}), ggml_free),
        q_(static_cast<std::size_t>(q.sizes[1] * q.sizes[2] * q.sizes[3])),
        out_(static_cast<std::size_t>(q.sizes[1] * q.sizes[2] * v.sizes[3])) {
    const auto count = static_cast<std::int64_t>(q_.size());
    if (q.dtype == DType::kFloat32) std::memcpy(q_.data(), q.data, q_.size() * sizeof(float));
    if (q.dtype == DType::kFloat16) {
      ggml_fp16_to_fp32_row(static_cast<const ggml_fp16_t*>(q.data), q_.data(), count);
    }
    if (q.dtype == DType::kBFloat16) {
      ggml_bf16_to_fp32_row(static_cast<const ggml_bf16_t*>(q.data), q_.data(), count);
    }
    ggml_tensor* result =
        ggml_flash_attn_ext(context_.get(), tensor(q, GGML_TYPE_F32, q_.data()),
                            tensor(k, type(k.dtype), k.data), tensor(v, type(v.dtype), v.data),
                            nullptr, 1.0f / std::sqrt(static_cast<float>(q.sizes[3])), 0.0f, 0.0f);
    result->data = out_.data();
    graph_ = ggml_new_graph(context_.get());
    ggml_build_forward_expand(graph_, result);
    plan_ = ggml_graph_plan(graph_, num_threads, nullptr);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  void run() override {
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("ggml_graph_compute failed");
    }
  }
  const float* out() const override { return out_.data(); }

 private:
  static ggml_type type(DType dtype) {
    return dtype == DType::kFloat32   ? GGML_TYPE_F32
           : dtype == DType::kFloat16 ? GGML_TYPE_F16
                                      : GGML_TYPE_BF16;
  }
  ggml_tensor* tensor(const TensorView& t, ggml_type as, const void* data) {
    ggml_tensor* result =
        ggml_new_tensor_4d(context_.get(), as, t.sizes[3], t.sizes[2], t.sizes[1], t.sizes[0]);
    result->data = const_cast<void*>(data);
    return result;
  }

  std::vector<std::uint8_t> memory_;
  std::unique_ptr<ggml_context, void (*)(ggml_context*)> context_;
  std::vector<float> q_, out_;
  std::vector<std::uint8_t> work_;
  ggml_cgraph* graph_ = nullptr;
  ggml_cplan plan_{};
};

}  // namespace

std::unique_ptr<Peer> make_peer(const TensorView& q, const TensorView& k, const TensorView& v,
                                int num_threads) {
  return std::make_unique<Ggml>(q, k, v, num_threads);
}
#else
std::unique_ptr<Peer> make_peer(const TensorView&, const TensorView&, const TensorView&, int) {
  return nullptr;
}
#endif

}  // namespace keyfold::benchmarks

// Small calls.
#include "warm.hpp"

#include <keyfold/attention.hpp>

#include "command.hpp"
#include "random_tensor.hpp"

namespace keyfold::cli {
namespace {

struct Kind {
  DType dtype = DType::kBFloat16;
  std::int64_t head_dim = 128;
  std::int64_t q_len = 1, heads = 1;
  std::int64_t splits = 1;  // kernels may be others for one
};

AttentionShape shape_of(const Kind& kind) {
  return {.batch = 1,
          .num_heads = kind.heads,
          .num_kv_heads = 1,
          .q_len = kind.q_len,
          .kv_len = 1,
          .head_dim = kind.head_dim,
          .value_dim = kind.head_dim,
          .dtype = kind.dtype};
}

void call(const std::string& backend, const Kind& kind, const std::stop_token& stop_token) {
  AttentionShape shape = shape_of(kind);
  AttentionOptions options;
  options.run.backend = backend;
  options.run.stop_token = stop_token;
  options.run.chunk_threshold = std::int64_t{1} << 20;  // one dispatch
  if (kind.splits > 1) shape.kv_len = kind.splits * plan(shape, options).split_len;
  const auto tensor = [&](std::int64_t heads, std::int64_t len) {
    return RandomTensor(kind.dtype, {1, heads, len, kind.head_dim}, 1, 1, stop_token);
  };
  const RandomTensor q = tensor(kind.heads, kind.q_len), k = tensor(1, shape.kv_len);
  const RandomTensor out = tensor(kind.heads, kind.q_len);
  scaled_dot_product_attention(q.view(), k.view(), k.view(), out.view(), options);
  keyfold::warm(shape, options);  // what tensors on the device need besides
}

}  // namespace

int warm(const DeviceInfo& device, const std::stop_token& stop_token) {
  constexpr std::int64_t kPrefill = 64;  // rows
  // Of more there may be kernels for few rows, some, a round of tiles, many.
  constexpr std::int64_t kMoreRows[] = {200, 512, 2048, 65536};
  if (device.type == "cpu") return 0;
  int calls = 0;
  const auto run = [&](const Kind& kind) {
    check_stop(stop_token);
    call(device.backend, kind, stop_token);
    ++calls;
  };
  const auto compile = [&](const Kind& kind) {
    check_stop(stop_token);
    AttentionOptions options;
    options.run.backend = device.backend;
    keyfold::warm(shape_of(kind), options);
    ++calls;
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const std::int64_t head_dim : {64, 128, 256}) {
      for (const std::int64_t splits : {1, 2}) run({dtype, head_dim, kPrefill, 1, splits});
      for (const std::int64_t heads : {1, 4, 8}) run({dtype, head_dim, 1, heads});
      for (const std::int64_t rows : kMoreRows) compile({dtype, head_dim, rows});
    }
  }
  return calls;
}

}  // namespace keyfold::cli

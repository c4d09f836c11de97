// The fixture of every test that runs once per backend, through the public interface only.
#include "support/backends.hpp"

#include <cstdlib>
#include <sstream>

#include "support/device_tensors.hpp"

namespace keyfold::test {

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  if (const char* text = std::getenv("KEYFOLD_TEST_BACKENDS")) {
    std::istringstream list(text);
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
  }
  for (const DeviceInfo& device : devices()) names.push_back(device.backend);
  return names;
}

std::vector<std::byte> Outputs::bytes() const {
  std::vector<std::byte> all = out.bytes();
  const std::vector<std::byte> more = lse.bytes();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

void BackendTest::SetUp() {
  std::string absent = "backend " + GetParam();
  try {
    for (const DeviceInfo& device : devices()) {
      if (device.backend != GetParam()) continue;
      absent.clear();
      // Set where each kernel has a run of its own, beside one of the whole suite without a name.
      if (std::getenv("KEYFOLD_TEST_NOT_DEFAULT") != nullptr &&
          device.kernel == device.kernels.front())
        GTEST_SKIP() << "kernel " << device.kernel << " is the default, which has its run anyway";
    }
  } catch (const InvalidArgument& e) {
    absent = e.argument() + " asks for a kernel that";
  }
  if (!absent.empty()) GTEST_SKIP() << absent << " is ABSENT on this machine: nothing was tested";
}

Outputs BackendTest::run(const Call& call, RunOptions how, Layout out_layout) const {
  const Dims sizes = call.out_sizes();
  Outputs got{Tensor(call.q.dtype, sizes, out_layout),
              Tensor(DType::kFloat32, {sizes[0], sizes[1], sizes[2], 1}, out_layout),
              {}};
  got.out.poison();
  got.lse.poison();
  AttentionOptions options = call.options;
  options.run = std::move(how);
  options.run.backend = GetParam();
  options.lse = got.lse.mutable_view();
  if (on_device(GetParam(), call)) {
    DeviceTensors device(GetParam());
    const Call there = device.copy({call.q, call.k, call.v, options});
    const MutableTensorView out = device.copy(got.out.mutable_view()),
                            lse = device.copy(got.lse.mutable_view());
    options = there.options;
    options.lse = lse;
    got.report = scaled_dot_product_attention(there.q, there.k, there.v, out, options);
    device.fetch(out, got.out.mutable_view());
    device.fetch(lse, got.lse.mutable_view());
    device.finish();
    return got;
  }
  got.report =
      scaled_dot_product_attention(call.q, call.k, call.v, got.out.mutable_view(), options);
  return got;
}

void BackendTest::expect_right(const Call& call, const Outputs& got,
                               const std::vector<RowId>& rows) const {
  const std::string kernel = plan_of(call).kernel;
  const bool matrices =
      call.q.dtype != DType::kFloat32 && (kernel.starts_with("matrix") || kernel.ends_with("mma"));
  EXPECT_TRUE(right(got.out, &got.lse, rows,
                    reference(call.q, call.k, call.v, call.options, rows, matrices),
                    naive(call.q, call.k, call.v, call.options, rows)));
}

void BackendTest::expect_right(const Case& c, Rng& rng, const RunOptions& how,
                               Layout out_layout) const {
  std::ostringstream name;
  name << c;
  SCOPED_TRACE(name.str());
  const Inputs inputs(c, rng);
  const Call call = inputs.call();
  expect_right(call, run(call, how, out_layout), all_rows(call.q));
}

bool BackendTest::decode_as_prefill() const {
  for (const DeviceInfo& device : devices())
    if (device.backend == GetParam()) return device.decode_as_prefill;
  return true;
}

std::int64_t BackendTest::split_len(DType dtype, std::int64_t q_len) const {
  Rng rng("split");
  return split_len(Inputs({.dtype = dtype, .q_len = q_len, .head_dim = 16}, rng).call());
}

Plan BackendTest::plan_of(const Call& call, RunOptions how) const {
  AttentionOptions options = call.options;
  options.run = std::move(how);
  options.run.backend = GetParam();
  return plan(call.shape(), options);
}

}  // namespace keyfold::test

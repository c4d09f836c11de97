// keyfold attend: attention over tensors in files.
#include <fmt/format.h>

#include <cstddef>
#include <keyfold/kv_store.hpp>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "call_flags.hpp"
#include "command.hpp"
#include "io/tensor_file.hpp"
#include "io/tensor_writer.hpp"
#include "numbers.hpp"
#include "progress.hpp"

namespace keyfold::cli {
namespace {

/// Sinks in a file: one logit per head, as [num_heads] or [1, num_heads, 1, 1].
TensorView sinks_view(const io::LoadedTensor& tensor) {
  const io::TensorLayout& layout = tensor.layout;
  if (layout.shape.size() != 1) return tensor.view();
  return {
      layout.data.data(), layout.dtype, {1, layout.shape[0], 1, 1}, {0, layout.strides[0], 0, 0}};
}

class AttendCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command = app.add_subcommand(
        "attend", "Compute attention over tensors in .npy or .safetensors files");
    const std::string group = "The tensors";
    const auto file = [&](const char* name, std::string& value, const char* help) {
      return command->add_option(name, value, help)->type_name("FILE")->group(group);
    };
    file("--q", q_, "Queries, [batch, num_heads, q_len, head_dim]")->required();
    CLI::Option* k = file("--k", k_, "Keys, [batch, num_kv_heads, kv_len, head_dim]");
    CLI::Option* v = file("--v", v_, "Values, [batch, num_kv_heads, kv_len, value_dim]");
    file("--kv", kv_, "Instead of --k and --v: a store of both, see 'keyfold store'")
        ->excludes(k)
        ->excludes(v);
    file("--out", out_, "Where the result goes, in the dtype of q")->required();
    file("--lse", lse_, "Where the natural-log logsumexp goes, float32 [batch, num_heads, q_len]");
    file("--mask", mask_,
         "Bool (true = visible) or additive mask that broadcasts to [batch, num_heads, q_len, "
         "kv_len]");
    file("--sinks", sinks_, "A logit per query head that joins the denominator only");
    command->add_option("--layout", layout_, "Axes of q, k, v and out: bhld or blhd")
        ->check(CLI::IsMember({"bhld", "blhd"}))
        ->type_name("AXES")
        ->capture_default_str()
        ->group(group);
    formula_.add_to(*command);
    run_.add_to(*command);
    command->footer(
        "FILE is PATH.npy, PATH.safetensors or PATH.safetensors:TENSOR. Keys and values are read "
        "as they are needed, so they may exceed memory; axes that are missing on the left count as "
        "1. Outputs appear only when all is done.\n\nExamples:\n"
        "  keyfold attend --q q.npy --k k.npy --v v.npy --out out.npy --causal\n"
        "  keyfold attend --q kv.safetensors:q --k kv.safetensors:k --v kv.safetensors:v \\\n"
        "      --out result.safetensors:out --lse result.safetensors:lse --window 4095,0");
    return command;
  }

  ExitCode run(const Context& context) override {
    const io::LoadedTensor q = io::open_tensor(q_);
    const std::unique_ptr<KeyValueSource> keys = open_keys();
    const TensorView q_view = view(q);
    AttentionOptions options = formula_.options();
    std::vector<io::LoadedTensor> extras;  // keeps their mappings
    if (!mask_.empty()) options.mask = extras.emplace_back(io::open_tensor(mask_)).view();
    if (!sinks_.empty()) options.sinks = sinks_view(extras.emplace_back(io::open_tensor(sinks_)));

    const KeyValueShape kv = keys->shape();
    const AttentionShape shape{q_view.sizes[0], q_view.sizes[1], kv.num_kv_heads, q_view.sizes[2],
                               keys->size(),    q_view.sizes[3], kv.value_dim,    q_view.dtype};
    io::TensorWriter writer(outputs(q, shape));
    const std::int64_t rows = shape.batch * shape.num_heads * shape.q_len;
    const auto out = std::make_unique_for_overwrite<std::byte[]>(
        static_cast<std::size_t>(rows * shape.value_dim * size_of(shape.dtype)));
    std::vector<float> lse(lse_.empty() ? 0 : static_cast<std::size_t>(rows));
    if (!lse_.empty())
      options.lse = MutableTensorView(lse.data(), DType::kFloat32,
                                      {shape.batch, shape.num_heads, shape.q_len, 1});

    ProgressBar bar(run_.wants_progress(context), "attend");
    options.run = run_.options(context);
    options.run.progress = [&](const Progress& progress) { bar.update(progress.fraction); };
    const Report report =
        scaled_dot_product_attention(q_view, *keys, out_view(out.get(), q, shape), options);
    const void* const data[] = {out.get(), lse.data()};
    writer.commit(std::span(data).first(lse_.empty() ? 1 : 2));
    bar.clear();
    if (run_.json)
      print_json(as_json(shape, report));
    else
      print(shape, report);
    return kOk;
  }

 private:
  std::unique_ptr<KeyValueSource> open_keys() const {
    if (!kv_.empty()) return KvStore::open(kv_).source();
    if (k_.empty() || v_.empty()) {
      throw InvalidArgument(k_.empty() ? "--k" : "--v", "expected --k and --v, or --kv");
    }
    return open_source(k_, v_, layout_ == "blhd" ? Axes::kBLHD : Axes::kBHLD);
  }

  /// Whether heads and rows of this file's tensor are the other way round.
  bool is_blhd(const io::LoadedTensor& tensor) const {
    return layout_ == "blhd" && tensor.layout.shape.size() >= 3;
  }

  TensorView view(const io::LoadedTensor& tensor) const {
    TensorView view = tensor.view();
    if (is_blhd(tensor)) {
      std::swap(view.sizes[1], view.sizes[2]);
      std::swap(view.strides[1], view.strides[2]);
    }
    return view;
  }

  /// The output in memory, with the axes in the order of q's file.
  MutableTensorView out_view(void* data, const io::LoadedTensor& q,
                             const AttentionShape& shape) const {
    Dims sizes{shape.batch, shape.num_heads, shape.q_len, shape.value_dim};
    if (!is_blhd(q)) return {data, shape.dtype, sizes};
    const Dims strides = dense_strides({sizes[0], sizes[2], sizes[1], sizes[3]});
    return {data, shape.dtype, sizes, {strides[0], strides[2], strides[1], strides[3]}};
  }

  /// out has as many axes as q, and lse one less.
  std::vector<io::OutputTensor> outputs(const io::LoadedTensor& q,
                                        const AttentionShape& shape) const {
    std::vector<std::int64_t> out_shape = q.layout.shape;
    out_shape.back() = shape.value_dim;
    std::vector<io::OutputTensor> outputs = {{out_, "out", shape.dtype, out_shape}};
    if (!lse_.empty()) {
      const std::vector<std::int64_t> all{shape.batch, shape.num_heads, shape.q_len};
      const auto skipped = static_cast<std::ptrdiff_t>(4 - out_shape.size());
      outputs.push_back({lse_, "lse", DType::kFloat32, {all.begin() + skipped, all.end()}});
    }
    return outputs;
  }

  void print(const AttentionShape& shape, const Report& report) const {
    fmt::print("shape      {}{}\n", shape_text(shape), formula_.text());
    fmt::print("backend    {}, kernel {}\n", report.backend, report.kernel);
    fmt::print("time       {} in {} dispatches, longest {}\n", readable_ms(report.elapsed_ms),
               report.dispatches, readable_ms(report.longest_dispatch_ms));
    if (report.recoveries > 0)
      fmt::print("recovered  {} times from a lost device\n", report.recoveries);
    fmt::print("memory     {} scratch, {} staging\n", readable_bytes(report.scratch_bytes),
               readable_bytes(report.staging_bytes));
    fmt::print("written    {}{}{}\n", out_, lse_.empty() ? "" : ", ", lse_);
  }

  nlohmann::ordered_json as_json(const AttentionShape& shape, const Report& report) const {
    nlohmann::ordered_json json = {
        {"shape", cli::as_json(shape)}, {"formula", formula_.as_json()}, {"out", out_}};
    if (!lse_.empty()) json["lse"] = lse_;
    json.update(cli::as_json(report));
    return json;
  }

  std::string q_, k_, v_, kv_, out_, lse_, mask_, sinks_, layout_ = "bhld";
  FormulaFlags formula_;
  RunFlags run_;
};

}  // namespace

std::unique_ptr<Command> attend_command() { return std::make_unique<AttendCommand>(); }

}  // namespace keyfold::cli

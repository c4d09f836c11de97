// keyfold bench: how fast attention runs here, beside what the machine can do.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <keyfold/device_memory.hpp>
#include <numeric>
#include <vector>

#include "bench_plot.hpp"
#include "call_flags.hpp"
#include "ceilings.hpp"
#include "command.hpp"
#include "memory.hpp"
#include "numbers.hpp"
#include "progress.hpp"
#include "random_tensor.hpp"

namespace keyfold::cli {
namespace {

/// What was measured.
struct Result {
  std::vector<double> times_ms;                  ///< wall time of each run, ascending
  std::vector<std::vector<double>> dispatch_ms;  ///< device time of each dispatch of each run
  std::vector<double> device_ms;                 ///< their sum in each run, ascending
  Report report;                                 ///< of the last run
  double budget_ms = 0;
  int num_threads = 0;              ///< of the CPU backend, else 0
  double pairs = 0;                 ///< visible query-key pairs, all heads
  std::optional<Ceilings> machine;  ///< measured for the CPU backend only
};

/// Bytes of k and v, as a number that cannot overflow.
double kv_bytes(const AttentionShape& s) {
  return static_cast<double>(s.batch) * static_cast<double>(s.num_kv_heads) *
         static_cast<double>(s.kv_len) * static_cast<double>(s.head_dim + s.value_dim) *
         static_cast<double>(size_of(s.dtype));
}

/// Bytes of q and out.
double row_bytes(const AttentionShape& s) {
  return static_cast<double>(s.batch) * static_cast<double>(s.num_heads) *
         static_cast<double>(s.q_len) * static_cast<double>(s.head_dim + s.value_dim) *
         static_cast<double>(size_of(s.dtype));
}

void check_memory(const AttentionShape& shape) {
  const double needed = kv_bytes(shape) + row_bytes(shape);
  const std::int64_t available = memory_available();
  if (available == 0 || needed <= static_cast<double>(available)) return;
  throw RunError(ErrorCode::kOutOfMemory,
                 fmt::format("q, k, v and out of this shape take {:.1f} GiB, {} are free; choose "
                             "fewer keys, rows or heads, or a 16-bit --dtype",
                             needed / (1 << 30), readable_bytes(available)));
}

/// Threads that the CPU backend uses for these options; 0 for another backend.
int cpu_threads(const std::string& backend, const RunOptions& options) {
  for (const DeviceInfo& device : devices())
    if (device.backend == backend)
      return std::min(device.num_threads, options.num_threads.value_or(device.num_threads));
  return 0;
}

double median(const std::vector<double>& ascending) {
  return (ascending[(ascending.size() - 1) / 2] + ascending[ascending.size() / 2]) / 2;
}

/// A tensor copied into the memory of the backend's device.
class ResidentTensor {
 public:
  ResidentTensor(const std::string& backend, const TensorView& from)
      : buffer_(backend, std::max<std::int64_t>(1, bytes(from))), view_(from) {
    if (bytes(from) > 0) buffer_.upload(0, from.data, bytes(from));
    view_.data = buffer_.data();
  }
  const TensorView& view() const { return view_; }

 private:
  static std::int64_t bytes(const TensorView& t) {
    return t.sizes[0] * t.sizes[1] * t.sizes[2] * t.sizes[3] * size_of(t.dtype);
  }
  DeviceBuffer buffer_;
  TensorView view_;
};

class BenchCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command = app.add_subcommand(
        "bench", "Time attention on random data, beside what this machine can do at most");
    shape_flags_.add_to(*command);
    formula_.add_to(*command);
    run_.add_to(*command);
    add_length(*command, "--runs", runs_, {1, 100000}, "Runs that are timed");
    add_length(*command, "--warmup", warmup_, {0, 100000}, "Runs before them that are not");
    command->add_flag("--no-ceilings", no_ceilings_,
                      "Do not measure the machine's FMA peak and read bandwidth");
    command->add_flag("--resident", resident_,
                      "Keep k and v in the memory of the backend's device, as an engine keeps its "
                      "cache");
    plot_.add_to(*command, "Draw the device time of every dispatch against the budget");
    command->footer(
        "GFLOP/s counts 2 * (head_dim + value_dim) for each visible pair; GB/s counts k and v "
        "once. The CPU's FMA peak and read bandwidth are measured in the same run, with as many "
        "threads.\n\nExamples:\n"
        "  keyfold bench --heads 8 --kv-heads 2 --q-len 512 --kv-len 32K --dtype float16\n"
        "  keyfold bench --q-len 1 --kv-len 64K --runs 20 --json\n"
        "  keyfold bench --kv-len 256K --interactive --plot dispatches.svg");
    return command;
  }

  ExitCode run(const Context& context) override {
    const AttentionShape shape = shape_flags_.shape();
    AttentionOptions options = formula_.options();
    options.run = run_.options(context);
    const Result result = measure(shape, options, context);
    plot_.write([&] {
      return plot_dispatches(result.dispatch_ms, result.budget_ms,
                             shape_text(shape) + formula_.text());
    });
    if (run_.json)
      print_json(as_json(shape, result));
    else
      print(shape, result);
    return kOk;
  }

 private:
  Result measure(const AttentionShape& shape, AttentionOptions& options, const Context& context) {
    Result result;
    const Plan plan = keyfold::plan(shape, options);  // refuses what the call would refuse
    check_memory(shape);
    plot_.open();
    result.budget_ms = plan.budget_ms;
    result.num_threads = cpu_threads(plan.backend, options.run);
    result.pairs = visible_pairs(shape, options);

    const AttentionShape& s = shape;
    const auto tensor = [&](std::int64_t heads, std::int64_t len, std::int64_t dim,
                            std::uint64_t seed) {
      return RandomTensor(s.dtype, {s.batch, heads, len, dim}, seed,
                          std::max(result.num_threads, 1), context.stop_token);
    };
    const RandomTensor q = tensor(s.num_heads, s.q_len, s.head_dim, 1);
    const RandomTensor k = tensor(s.num_kv_heads, s.kv_len, s.head_dim, 2);
    const RandomTensor v = tensor(s.num_kv_heads, s.kv_len, s.value_dim, 3);
    const RandomTensor out = tensor(s.num_heads, s.q_len, s.value_dim, 4);

    std::optional<ResidentTensor> device_k, device_v;
    if (resident_) {
      device_k.emplace(plan.backend, k.view());
      device_v.emplace(plan.backend, v.view());
    }
    const TensorView& keys = device_k ? device_k->view() : k.view();
    const TensorView& values = device_v ? device_v->view() : v.view();

    ProgressBar bar(run_.wants_progress(context), "bench");
    for (std::int64_t i = 0; i < warmup_ + runs_; ++i) {
      std::vector<double> dispatch_ms;
      options.run.progress = [&](const Progress& progress) {
        dispatch_ms.push_back(progress.last_dispatch_ms);
        bar.update((static_cast<double>(i) + progress.fraction) /
                   static_cast<double>(warmup_ + runs_));
      };
      const auto start = std::chrono::steady_clock::now();
      result.report = scaled_dot_product_attention(q.view(), keys, values, out.view(), options);
      const std::chrono::duration<double, std::milli> time =
          std::chrono::steady_clock::now() - start;
      if (i < warmup_) continue;
      result.times_ms.push_back(time.count());
      result.device_ms.push_back(std::accumulate(dispatch_ms.begin(), dispatch_ms.end(), 0.0));
      result.dispatch_ms.push_back(std::move(dispatch_ms));
    }
    std::ranges::sort(result.times_ms);
    std::ranges::sort(result.device_ms);
    if (result.num_threads > 0 && !no_ceilings_)
      result.machine =
          measure_ceilings(result.num_threads, [&] { check_stop(context.stop_token); });
    return result;
  }

  static double median_ms(const Result& result) { return median(result.times_ms); }

  static double gflops(const AttentionShape& shape, const Result& result) {
    return 2e-6 * static_cast<double>(shape.head_dim + shape.value_dim) * result.pairs /
           median_ms(result);
  }

  static double kv_gbs(const AttentionShape& shape, const Result& result) {
    return 1e-6 * kv_bytes(shape) / median_ms(result);
  }

  void print(const AttentionShape& shape, const Result& result) const {
    const Report& report = result.report;
    const auto share = [](double value, double most, const char* what, const char* unit) {
      return fmt::format(", {:.1f} % of this machine's {} of {:.1f} {}", 100 * value / most, what,
                         most, unit);
    };
    const double speed = gflops(shape, result), bandwidth = kv_gbs(shape, result);
    fmt::print("shape      {}{}\n", shape_text(shape), formula_.text());
    fmt::print("backend    {}, kernel {}{}\n", report.backend, report.kernel,
               result.num_threads > 0 ? fmt::format(", {} threads", result.num_threads) : "");
    fmt::print("time       {} median of {} runs, {} to {}\n", readable_ms(median_ms(result)),
               result.times_ms.size(), readable_ms(result.times_ms.front()),
               readable_ms(result.times_ms.back()));
    fmt::print(
        "compute    {:.1f} GFLOP/s{}\n", speed,
        result.machine ? share(speed, result.machine->fma_gflops, "FMA peak", "GFLOP/s") : "");
    fmt::print(
        "k and v    {:.2f} GB/s{}\n", bandwidth,
        result.machine ? share(bandwidth, result.machine->read_gbs, "read bandwidth", "GB/s") : "");
    if (result.num_threads == 0) {
      const double device = median(result.device_ms), wall = median_ms(result);
      fmt::print("device     {} median of the dispatches' sum: {:.1f} GFLOP/s, {:.2f} GB/s\n",
                 readable_ms(device), speed * wall / device, bandwidth * wall / device);
    }
    fmt::print("dispatches {} in the last run, longest {} (budget {:.4g} ms)\n", report.dispatches,
               readable_ms(report.longest_dispatch_ms), result.budget_ms);
    fmt::print("memory     {} scratch, {} staging\n", readable_bytes(report.scratch_bytes),
               readable_bytes(report.staging_bytes));
  }

  nlohmann::ordered_json as_json(const AttentionShape& shape, const Result& result) const {
    nlohmann::ordered_json json = {{"shape", cli::as_json(shape)},
                                   {"formula", formula_.as_json()},
                                   {"budget_ms", result.budget_ms},
                                   {"median_ms", median_ms(result)},
                                   {"min_ms", result.times_ms.front()},
                                   {"max_ms", result.times_ms.back()},
                                   {"gflops", gflops(shape, result)},
                                   {"kv_gbs", kv_gbs(shape, result)},
                                   {"machine", nullptr},
                                   {"last_run", cli::as_json(result.report)},
                                   {"times_ms", result.times_ms},
                                   {"device_ms", result.device_ms},
                                   {"dispatch_ms", result.dispatch_ms}};
    if (result.machine)
      json["machine"] = {{"num_threads", result.num_threads},
                         {"fma_gflops", result.machine->fma_gflops},
                         {"bfloat16_gflops", result.machine->bfloat16_gflops},
                         {"read_gbs", result.machine->read_gbs}};
    return json;
  }

  ShapeFlags shape_flags_;
  FormulaFlags formula_;
  RunFlags run_;
  PlotFlag plot_;
  std::int64_t runs_ = 5, warmup_ = 1;
  bool no_ceilings_ = false;
  bool resident_ = false;
};

}  // namespace

std::unique_ptr<Command> bench_command() { return std::make_unique<BenchCommand>(); }

}  // namespace keyfold::cli

// keyfold devices: what can run attention here.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <chrono>
#include <keyfold/plan.hpp>

#include "command.hpp"
#include "numbers.hpp"
#include "warm.hpp"

namespace keyfold::cli {
namespace {

class DevicesCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command = app.add_subcommand("devices", "List what can run attention here");
    command->add_flag("--json", json_, "Print one JSON document on stdout instead of text");
    command->add_flag(
        "--warm", warm_,
        "Compile the GPUs' common kernels now, into the cache on disk, so that no call "
        "waits for it");
    command->footer(
        "The first device is the default. Pass a backend's name to --backend or KEYFOLD_BACKEND to "
        "choose another.\n\nExamples:\n  keyfold devices --json\n  keyfold devices --warm");
    return command;
  }

  ExitCode run(const Context& context) override {
    const std::vector<DeviceInfo> all = devices();
    if (warm_) {
      for (const DeviceInfo& device : all) warm_up(device, context);
    }
    if (json_) {
      print_json(as_json(all));
    } else {
      for (const DeviceInfo& device : all) print(device);
    }
    return kOk;
  }

 private:
  static std::vector<std::string_view> dtype_names(const DeviceInfo& device) {
    std::vector<std::string_view> names;
    for (const DType dtype : device.dtypes) names.push_back(name_of(dtype));
    return names;
  }

  static void warm_up(const DeviceInfo& device, const Context& context) {
    if (device.kernels.empty()) return;  // it can't compute: see its kernel
    const auto start = std::chrono::steady_clock::now();
    const int calls = warm(device, context.stop_token);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    if (calls > 0) {
      fmt::print(stderr, "{}: kernels of {} kinds of calls are ready after {:.1f} s\n",
                 device.backend, calls, time.count());
    }
  }

  static void print(const DeviceInfo& device) {
    fmt::print("{}: {}\n", device.backend, device.name);
    fmt::print("  type       {}\n", device.type);
    if (!device.driver.empty()) fmt::print("  driver     {}\n", device.driver);
    fmt::print("  kernel     {}", device.kernel);
    if (!device.kernels.empty()) fmt::print(" (of {})", fmt::join(device.kernels, ", "));
    fmt::print("\n");
    if (device.num_threads > 0) fmt::print("  threads    {}\n", device.num_threads);
    fmt::print("  memory     {}\n", readable_bytes(device.memory_bytes));
    if (device.max_shared_bytes > 0)
      fmt::print("  shared     {} per workgroup\n", readable_bytes(device.max_shared_bytes));
    if (device.subgroup_size > 0) fmt::print("  subgroup   {} lanes\n", device.subgroup_size);
    if (!device.watchdog.empty()) fmt::print("  watchdog   {}\n", device.watchdog);
    fmt::print("  dtypes     {}\n", fmt::join(dtype_names(device), ", "));
    fmt::print("  head_dim   1 to {}\n", device.max_head_dim);
  }

  static nlohmann::ordered_json as_json(const std::vector<DeviceInfo>& all) {
    auto list = nlohmann::ordered_json::array();
    for (const DeviceInfo& device : all)
      list.push_back({{"backend", device.backend},
                      {"name", device.name},
                      {"kernel", device.kernel},
                      {"kernels", device.kernels},
                      {"num_threads", device.num_threads},
                      {"memory_bytes", device.memory_bytes},
                      {"max_head_dim", device.max_head_dim},
                      {"dtypes", dtype_names(device)},
                      {"type", device.type},
                      {"driver", device.driver},
                      {"watchdog", device.watchdog},
                      {"max_shared_bytes", device.max_shared_bytes},
                      {"subgroup_size", device.subgroup_size}});
    return {{"devices", list}};
  }

  bool json_ = false, warm_ = false;
};

}  // namespace

std::unique_ptr<Command> devices_command() { return std::make_unique<DevicesCommand>(); }

}  // namespace keyfold::cli

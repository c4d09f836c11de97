// Where the validation layer is on, it sees mistakes and ends the process: its silence elsewhere
// means something.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <string_view>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/busy_device.hpp"

namespace keyfold::watchdog {
namespace {

/// Runs `mistake` on a device.
template <class Mistake>
void make(Mistake mistake) {
  const vk::raii::Context context;
  const vk::ApplicationInfo application("validation_test", 0, {}, 0, VK_API_VERSION_1_3);
  const vk::raii::Instance instance(context, vk::InstanceCreateInfo({}, &application));
  const vk::raii::PhysicalDevices devices(instance);
  BusyDevice device(devices.front());
  mistake(device);
}

void invalid_argument(BusyDevice& device) {
  const vk::raii::Buffer empty(
      device.device(), vk::BufferCreateInfo({}, 0, vk::BufferUsageFlagBits::eStorageBuffer));
}

void missing_barrier(BusyDevice& device) {
  vk::raii::CommandBuffer commands = device.commands();
  commands.begin({});
  commands.fillBuffer(device.buffer(), 0, 4, 1);
  commands.fillBuffer(device.buffer(), 0, 4, 2);
  commands.end();
}

TEST(Validation, EndsTheProcessAtAMistake) {
  const char* layers = std::getenv("VK_INSTANCE_LAYERS");
  if (layers == nullptr ||
      std::string_view(layers).find("VK_LAYER_KHRONOS_validation") == std::string_view::npos) {
    GTEST_SKIP() << "the validation layer is off";
  }
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(make(invalid_argument), testing::KilledBySignal(SIGTRAP), "");
  EXPECT_EXIT(make(missing_barrier), testing::KilledBySignal(SIGTRAP), "");
  make([](BusyDevice& device) { (void)device.wait(device.submit(1)); });
}

}  // namespace
}  // namespace keyfold::watchdog

// The watchdog layer by itself, on a shader that is busy for as long as a test wants.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>
#include <vulkan/vulkan_raii.hpp>

#include "vulkan/busy_device.hpp"
#include "vulkan/watchdog/watch.hpp"

namespace keyfold::watchdog {
namespace {

using namespace std::chrono_literals;

constexpr std::uint32_t kShort = 1;  // groups
constexpr double kLimitMs = 100;

/// An instance under the watchdog.
class Machine {
 public:
  explicit Machine(Watch::Variables variables = {})
      : watch_(variables), instance_(make_instance()), devices_(instance_) {}

  bool absent() const { return devices_.empty(); }
  BusyDevice device() const { return BusyDevice(devices_.front()); }
  const Watch& watch() const { return watch_; }

 private:
  vk::raii::Instance make_instance() const {
    const vk::ApplicationInfo application("watchdog_test", 0, {}, 0, VK_API_VERSION_1_3);
    return {context_, vk::InstanceCreateInfo({}, &application)};
  }

  Watch watch_;
  vk::raii::Context context_;
  vk::raii::Instance instance_;
  vk::raii::PhysicalDevices devices_;
};

/// How the log says that submissions ended, in its order.
std::vector<std::string> ends(const Machine& machine) {
  std::vector<std::string> all;
  for (const Watched& watched : machine.watch().log()) all.push_back(watched.end);
  return all;
}

/// All that the layer turns into a lost device.
void expect_lost(BusyDevice& busy) {
  const vk::raii::Device& device = busy.device();
  const vk::raii::Fence fence(device, vk::FenceCreateInfo());
  EXPECT_THROW(busy.submit(kShort), vk::DeviceLostError);
  EXPECT_THROW((void)busy.wait(1), vk::DeviceLostError);
  EXPECT_THROW((void)busy.wait(busy.last() + 1), vk::DeviceLostError);
  EXPECT_THROW((void)device.waitForFences(*fence, true, BusyDevice::kPatience),
               vk::DeviceLostError);
  EXPECT_THROW((void)fence.getStatus(), vk::DeviceLostError);
  EXPECT_THROW(busy.counter(), vk::DeviceLostError);
  EXPECT_THROW(busy.queue().waitIdle(), vk::DeviceLostError);
  EXPECT_THROW(device.waitIdle(), vk::DeviceLostError);
  if (busy.synchronization2()) {
    EXPECT_THROW(busy.submit2(kShort), vk::DeviceLostError);
  }
}

class Watchdog : public testing::Test {
 protected:
  void SetUp() override {
    if (Machine().absent()) GTEST_SKIP() << "a Vulkan device is ABSENT: nothing was tested";
  }

  /// Groups that take the device clearly longer than the limit.
  static std::uint32_t long_groups() {
    static std::uint32_t groups = 0;
    if (groups > 0) return groups;
    const Machine machine;
    BusyDevice device = machine.device();
    for (groups = 256; groups < 1U << 25; groups *= 2) {
      run(device, groups);
      if (machine.watch().log().back().device_ms > 3 * kLimitMs) break;
    }
    return groups;
  }

  static void run(BusyDevice& device, std::uint32_t groups) {
    ++made;
    EXPECT_EQ(device.wait(device.submit(groups)), vk::Result::eSuccess);
  }

  static std::string limit() { return std::to_string(kLimitMs); }
  /// The number of the submission that comes after `more` others.
  static std::string nth(int more) { return std::to_string(made + 1 + more); }

  static inline int made = 0;  // submissions of this process
};

TEST_F(Watchdog, LongSubmissionLosesTheDevice) {
  const std::uint32_t groups = long_groups();
  const Machine machine({{"MS", limit()}});
  {
    BusyDevice device = machine.device();
    for (int i = 0; i < 3; ++i) run(device, kShort);
    EXPECT_THROW(run(device, groups), vk::DeviceLostError);
    expect_lost(device);
  }
  BusyDevice fresh = machine.device();
  run(fresh, kShort);

  const std::vector<Watched> log = machine.watch().log();
  ASSERT_EQ(ends(machine), (std::vector<std::string>{"", "", "", "LOST", ""}));
  EXPECT_GT(log[3].device_ms, kLimitMs);
  EXPECT_LT(log[0].device_ms, kLimitMs);
  for (std::size_t i = 1; i < log.size(); ++i) EXPECT_EQ(log[i].submission, log[0].submission + i);
  EXPECT_EQ(log[4].device, log[3].device + 1);
  EXPECT_EQ(machine.watch().longest_ms(), log[3].device_ms);
}

TEST_F(Watchdog, WithoutALimitItOnlyRecords) {
  const std::uint32_t groups = long_groups();
  const Machine machine;
  BusyDevice device = machine.device();
  run(device, groups);
  run(device, kShort);
  EXPECT_EQ(ends(machine), (std::vector<std::string>{"", ""}));
  EXPECT_GT(machine.watch().longest_ms(), kLimitMs);
  const Watched first = machine.watch().log().front();
  EXPECT_GE(first.wall_ms, first.device_ms * 0.9);
}

TEST_F(Watchdog, WaitingBehindALongOneIsNotTime) {
  const std::uint32_t groups = long_groups();
  const Machine machine;
  BusyDevice device = machine.device();
  device.submit(groups);
  const std::uint64_t last = device.submit(kShort);
  made += 2;
  ASSERT_EQ(device.wait(last), vk::Result::eSuccess);
  const std::vector<Watched> log = machine.watch().log();
  ASSERT_EQ(log.size(), 2U);
  EXPECT_GT(log[0].device_ms, kLimitMs);
  EXPECT_LT(log[1].device_ms, kLimitMs);
}

TEST_F(Watchdog, SubmissionsOfBothKindsAreTimed) {
  const std::uint32_t groups = long_groups();
  const Machine machine({{"MS", limit()}});
  BusyDevice device = machine.device();
  if (!device.synchronization2()) GTEST_SKIP() << "no vkQueueSubmit2 here";
  ASSERT_EQ(device.wait(device.submit2(kShort)), vk::Result::eSuccess);
  const std::uint64_t last = device.submit2(groups);
  made += 2;
  EXPECT_THROW(device.wait(last), vk::DeviceLostError);
  EXPECT_EQ(ends(machine), (std::vector<std::string>{"", "LOST"}));
}

TEST_F(Watchdog, EveryWayToSeeTheEndJudges) {
  using See = void (*)(BusyDevice&, const vk::raii::Fence&);
  const See ways[] = {
      [](BusyDevice& d, const vk::raii::Fence&) { (void)d.wait(d.last()); },
      [](BusyDevice& d, const vk::raii::Fence&) {
        while (d.counter() < d.last()) std::this_thread::yield();
      },
      [](BusyDevice& d, const vk::raii::Fence& fence) {
        (void)d.device().waitForFences(*fence, true, BusyDevice::kPatience);
      },
      [](BusyDevice&, const vk::raii::Fence& fence) {
        while (fence.getStatus() != vk::Result::eSuccess) std::this_thread::yield();
      },
      [](BusyDevice& d, const vk::raii::Fence&) { d.queue().waitIdle(); },
      [](BusyDevice& d, const vk::raii::Fence&) { d.device().waitIdle(); },
  };
  for (const See see : ways) {
    const Machine machine({{"LOSE_AT", nth(0)}});
    BusyDevice device = machine.device();
    const vk::raii::Fence fence(device.device(), vk::FenceCreateInfo());
    device.submit(kShort, *fence);
    ++made;
    EXPECT_THROW(see(device, fence), vk::DeviceLostError);
    EXPECT_EQ(ends(machine), std::vector<std::string>{"LOST"});
  }
}

TEST_F(Watchdog, ChosenSubmissionsAreLost) {
  const Machine machine({{"LOSE_AT", nth(1) + "," + nth(2)}});
  for (const int good : {1, 0}) {
    BusyDevice device = machine.device();
    for (int i = 0; i < good; ++i) run(device, kShort);
    EXPECT_THROW(run(device, kShort), vk::DeviceLostError);
    expect_lost(device);
  }
  BusyDevice device = machine.device();
  run(device, kShort);
  EXPECT_EQ(ends(machine), (std::vector<std::string>{"", "LOST", "LOST", ""}));
}

TEST_F(Watchdog, WhatIsInFlightIsLostToo) {
  const Machine machine({{"LOSE_AT", nth(1)}});
  BusyDevice device = machine.device();
  for (int i = 0; i < 4; ++i) device.submit(kShort);
  made += 4;
  EXPECT_EQ(device.wait(1), vk::Result::eSuccess);
  EXPECT_THROW((void)device.wait(2), vk::DeviceLostError);
  EXPECT_THROW((void)device.wait(1), vk::DeviceLostError);
  EXPECT_EQ(ends(machine), (std::vector<std::string>{"", "LOST", "DROPPED", "DROPPED"}));
}

TEST_F(Watchdog, AWaitForWhatNeverComesEndsWithTheDevice) {
  const Machine machine({{"LOSE_AT", nth(0)}});
  BusyDevice device = machine.device();
  bool lost = false;
  std::thread waiter([&] {
    try {
      (void)device.wait(1000);
    } catch (const vk::DeviceLostError&) {
      lost = true;
    }
  });
  std::this_thread::sleep_for(50ms);
  EXPECT_THROW(run(device, kShort), vk::DeviceLostError);
  waiter.join();
  EXPECT_TRUE(lost);
}

TEST_F(Watchdog, WaitsRunOut) {
  const Machine machine({{"MS", limit()}});
  BusyDevice device = machine.device();
  EXPECT_EQ(device.wait(1, 0), vk::Result::eTimeout);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(device.wait(1, 50'000'000), vk::Result::eTimeout);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 50ms);
  run(device, kShort);
}

TEST_F(Watchdog, OneSubmissionIsRefused) {
  const Machine machine({{"OOM_AT", nth(1)}});
  BusyDevice device = machine.device();
  run(device, kShort);
  EXPECT_THROW(run(device, kShort), vk::OutOfDeviceMemoryError);
  run(device, kShort);
  EXPECT_EQ(ends(machine), (std::vector<std::string>{"", "REFUSED", ""}));
}

TEST_F(Watchdog, LargeAllocationsAreRefused) {
  const Machine machine({{"NO_MEMORY_OVER", "65536"}});
  const BusyDevice device = machine.device();
  EXPECT_NO_THROW(vk::raii::DeviceMemory(device.device(), {65536, 0}));
  EXPECT_THROW(vk::raii::DeviceMemory(device.device(), {65537, 0}), vk::OutOfDeviceMemoryError);
}

TEST_F(Watchdog, ManyUnseenSubmissionsAndManyThreads) {
  const Machine machine;
  BusyDevice device = machine.device();
  constexpr int kThreads = 4, kEach = 50;
  std::mutex queue;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < kEach; ++i) {
        std::uint64_t value = 0;
        {
          const std::lock_guard lock(queue);
          value = device.submit(kShort);
        }
        if (i % 25 == 24) {
          EXPECT_EQ(device.wait(value), vk::Result::eSuccess);
        }
      }
    });
  for (std::thread& thread : threads) thread.join();
  made += kThreads * kEach;
  device.device().waitIdle();
  EXPECT_EQ(machine.watch().log().size(), kThreads * kEach);
}

TEST_F(Watchdog, BadVariablesEndTheInstance) {
  const std::vector<std::pair<const char*, std::string>> bad{
      {"MS", ""},       {"MS", "0"},
      {"MS", "-1"},     {"MS", "5s"},
      {"MS", "inf"},    {"MS", "nan"},
      {"LOSE_AT", ""},  {"LOSE_AT", "1,"},
      {"LOSE_AT", "0"}, {"OOM_AT", "1,2"},
      {"OOM_AT", "x"},  {"LOG", "/no/f"},
      {"MSEC", "1"},    {"NO_MEMORY_OVER", "1e3"},
  };
  for (const auto& [name, value] : bad) {
    testing::internal::CaptureStderr();
    EXPECT_THROW(Machine({{name, value}}), vk::InitializationFailedError) << name << "=" << value;
    const std::string message = testing::internal::GetCapturedStderr();
    EXPECT_NE(message.find(std::string("KEYFOLD_WATCHDOG_") + name), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace keyfold::watchdog

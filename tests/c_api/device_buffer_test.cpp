// Memory on a device through the C API, on a backend that has memory and nothing else.
#include <gtest/gtest.h>

#include "core/registry.hpp"
#include "support.hpp"

namespace keyfold::test {
namespace {

class MemoryBackend : public core::Backend {
 public:
  class Memory : public core::DeviceMemory {
   public:
    explicit Memory(std::int64_t bytes) : data_(static_cast<std::size_t>(bytes)) {}
    void upload(std::int64_t offset, const void* from, std::int64_t bytes) override {
      std::memcpy(data_.data() + offset, from, static_cast<std::size_t>(bytes));
    }
    void download(std::int64_t offset, void* to, std::int64_t bytes) const override {
      std::memcpy(to, data_.data() + offset, static_cast<std::size_t>(bytes));
    }

   private:
    std::vector<char> data_;
  };

  DeviceInfo device() const override {
    DeviceInfo info;
    info.backend = "memory";
    return info;
  }
  std::string unsupported(const core::Problem&) const override { return "it only remembers"; }
  core::KernelInfo kernel(const core::Problem&) const override { return {}; }
  std::int64_t scratch_bytes(const core::Problem&, std::int64_t, std::int64_t, int) const override {
    return 0;
  }
  std::unique_ptr<core::Run> begin(const core::Problem&, const core::Block&, int) override {
    return nullptr;
  }
  std::shared_ptr<core::DeviceMemory> allocate(std::int64_t bytes) override {
    return std::make_shared<Memory>(bytes);
  }
};

class CApiDeviceBuffer : public testing::Test {
 protected:
  CApiDeviceBuffer() { core::register_backend(std::make_shared<MemoryBackend>()); }
};

TEST_F(CApiDeviceBuffer, KeepsWhatItIsGiven) {
  keyfold_device_buffer* buffer = nullptr;
  ASSERT_EQ(keyfold_device_buffer_create("memory", 1000, &buffer), KEYFOLD_OK)
      << keyfold_last_error();
  const std::vector<int> sent = {1, 2, 3};
  std::vector<int> got(3);
  EXPECT_EQ(keyfold_device_buffer_upload(buffer, 988, sent.data(), 12), KEYFOLD_OK);
  EXPECT_EQ(keyfold_device_buffer_download(buffer, 988, got.data(), 12), KEYFOLD_OK);
  EXPECT_EQ(sent, got);
  EXPECT_EQ(keyfold_device_buffer_upload(buffer, 989, sent.data(), 12), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_download(buffer, -1, got.data(), 1), KEYFOLD_INVALID_ARGUMENT);
  keyfold_device_buffer_destroy(buffer);
}

TEST_F(CApiDeviceBuffer, ItsAddressLeadsACallToItsBackend) {
  Call call;
  const auto bytes = static_cast<std::int64_t>(call.k.values().size() * sizeof(float));
  keyfold_device_buffer* buffer = nullptr;
  ASSERT_EQ(keyfold_device_buffer_create("memory", bytes, &buffer), KEYFOLD_OK);
  void* data = nullptr;
  ASSERT_EQ(keyfold_device_buffer_data(buffer, &data), KEYFOLD_OK);
  DLTensor q = call.q.dl(), k = call.k.dl(), v = call.v.dl(), out = call.out.dl();
  k.data = data;
  EXPECT_EQ(keyfold_scaled_dot_product_attention(&q, &k, &v, &out, nullptr),
            KEYFOLD_INVALID_ARGUMENT);
  EXPECT_NE(std::string(keyfold_last_error()).find("where k is"), std::string::npos);
  v.data = data;
  EXPECT_EQ(keyfold_scaled_dot_product_attention(&q, &k, &v, &out, nullptr), KEYFOLD_UNSUPPORTED);
  EXPECT_NE(std::string(keyfold_last_error()).find("memory: it only remembers"), std::string::npos);
  k.byte_offset = 4;
  EXPECT_EQ(keyfold_scaled_dot_product_attention(&q, &k, &v, &out, nullptr),
            KEYFOLD_INVALID_ARGUMENT);
  EXPECT_NE(std::string(keyfold_last_error()).find("inside its device buffer"), std::string::npos);
  keyfold_device_buffer_destroy(buffer);
}

TEST_F(CApiDeviceBuffer, WhatIsRefused) {
  keyfold_device_buffer* buffer = nullptr;
  void* data = nullptr;
  EXPECT_EQ(keyfold_device_buffer_create(nullptr, 1, &buffer), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_create("memory", 1, nullptr), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_create("memory", 0, &buffer), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_create("abacus", 1, &buffer), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_create("cpu", 1, &buffer), KEYFOLD_UNSUPPORTED);
  EXPECT_EQ(buffer, nullptr);
  EXPECT_EQ(keyfold_device_buffer_data(nullptr, &data), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_upload(nullptr, 0, &data, 1), KEYFOLD_INVALID_ARGUMENT);
  EXPECT_EQ(keyfold_device_buffer_download(nullptr, 0, &data, 1), KEYFOLD_INVALID_ARGUMENT);
  keyfold_device_buffer_destroy(nullptr);
}

}  // namespace
}  // namespace keyfold::test

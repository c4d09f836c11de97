// Files made by hand for the tests: whole and broken ones.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "keyfold/error.hpp"

namespace keyfold::io::test {

using Shape = std::vector<std::int64_t>;

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// Little-endian bytes of values.
template <typename T>
std::string data_of(const std::vector<T>& values) {
  std::string data(values.size() * sizeof(T), '\0');
  if (!values.empty()) std::memcpy(data.data(), values.data(), data.size());
  return data;
}

inline std::string little_endian(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
  return text;
}

// A .npy file around this dictionary, its data at a multiple of 16.
inline std::string npy_file(std::string dictionary, const std::string& data, int major = 1) {
  const int length_bytes = major == 1 ? 2 : 4;
  while ((8 + static_cast<std::size_t>(length_bytes) + dictionary.size() + 1) % 16 != 0) {
    dictionary += ' ';
  }
  dictionary += '\n';
  return std::string("\x93NUMPY") + static_cast<char>(major) + '\0' +
         little_endian(dictionary.size(), length_bytes) + dictionary + data;
}

// A safetensors file around this header, padded as the reference implementation does.
inline std::string safetensors_file(std::string header, const std::string& data) {
  while (header.size() % 8 != 0) header += ' ';
  return little_endian(header.size(), 8) + header + data;
}

// One entry of a safetensors header.
inline std::string entry(const std::string& name, const std::string& dtype,
                         const std::string& shape, const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

// Matches a callable that throws InvalidArgument whose message holds this text.
inline auto throws_invalid(const std::string& part) {
  return ::testing::ThrowsMessage<InvalidArgument>(::testing::HasSubstr(part));
}

// A folder that is removed with all that is in it.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = ::testing::TempDir() + "keyfold-io-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string operator/(const std::string& name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }
  // Names of the files in it.
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& file : std::filesystem::directory_iterator(path_)) {
      result.push_back(file.path().filename());
    }
    return result;
  }

 private:
  std::filesystem::path path_;
};

inline void save(const std::string& path, const std::string& contents) {
  std::ofstream(path, std::ios::binary) << contents;
}

inline std::string load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace keyfold::io::test

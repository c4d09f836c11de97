// A text that is read piece by piece, as nobody may need all of it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>

namespace keyfold::cli {

struct Text {
  std::int64_t size = 0;  ///< bytes
  /// Bytes [begin, end) of it.
  std::function<std::string(std::int64_t begin, std::int64_t end)> read;

  Text(std::int64_t bytes, std::function<std::string(std::int64_t, std::int64_t)> reader)
      : size(bytes), read(std::move(reader)) {}
  /// One in memory.
  Text(std::string text) : size(static_cast<std::int64_t>(text.size())) {
    read = [all = std::move(text)](std::int64_t begin, std::int64_t end) {
      return all.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    };
  }
};

}  // namespace keyfold::cli

// A KeyValueSource over a call's own arrays, cut as a test asks.
#pragma once

#include <functional>

#include "keyfold/source.hpp"
#include "support/case.hpp"

namespace keyfold::test {

class ArraySource : public KeyValueSource {
 public:
  /// `piece(left)` is the length of the next piece, 1 to left.
  ArraySource(const Call& call, std::function<std::int64_t(std::int64_t)> piece)
      : size_(call.k.sizes[2]), k_(call.k), v_(call.v), piece_(std::move(piece)) {}

  KeyValueShape shape() const override {
    return {k_.sizes[0], k_.sizes[1], k_.sizes[3], v_.sizes[3], k_.dtype};
  }
  std::int64_t size() const override { return size_; }
  bool grows() const override { return grows_; }
  void seek(std::int64_t begin, std::int64_t end) override {
    at_ = begin, end_ = std::min(end, k_.sizes[2]);
    seeks_ += 1;
    if (seeks_left_-- == 0) throw RunError(ErrorCode::kDeviceFailure, "the source is broken");
  }
  KeyValuePiece next() override {
    if (at_ >= fails_at_) throw RunError(ErrorCode::kDeviceFailure, "the source is broken");
    const std::int64_t begin = at_;
    if (begin < end_) at_ = std::min(end_, begin + piece_(end_ - begin));
    given_ += at_ - begin;
    return {slice(k_, 2, begin, at_), slice(v_, 2, begin, at_)};
  }
  void release() override { releases_ += 1; }

  bool grows_ = false;
  std::int64_t size_;  // what it says
  std::int64_t fails_at_ = std::int64_t{1} << 60;
  std::int64_t seeks_left_ = std::int64_t{1} << 60;
  std::int64_t seeks_ = 0, releases_ = 0, given_ = 0;

 private:
  TensorView k_, v_;
  std::function<std::int64_t(std::int64_t)> piece_;
  std::int64_t at_ = 0, end_ = 0;
};

}  // namespace keyfold::test

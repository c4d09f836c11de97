// AmxUnit in plain code, with the arithmetic that Intel documents for TDPBF16PS: what the tests run
// where there is no AMX.
#pragma once

#include <pmmintrin.h>

#include <bit>
#include <cstring>

#include "cpu/tiles/unit.hpp"

namespace keyfold::cpu::tiles {

struct EmulatedUnit {
  static void configure(std::int64_t rows) {
    for (int i = 0; i < 8; ++i) tiles()[i] = {.rows = rows_of_tile(i, rows)};
  }
  static void release() {
    for (int i = 0; i < 8; ++i) {
      tiles()[i].rows = kTileRows;
      std::memset(tiles()[i].words, 0xff, kTileBytes);  // NaN
    }
  }

  template <int kTile>
  static void zero() {
    std::memset(tiles()[kTile].words, 0, kTileBytes);
  }
  template <int kTile>
  static void load(const void* p, std::int64_t stride) {
    for (std::int64_t r = 0; r < tiles()[kTile].rows; ++r) {
      std::memcpy(tiles()[kTile].words[r], static_cast<const char*>(p) + r * stride, kTileRowBytes);
    }
  }
  template <int kTile>
  static void store(void* p, std::int64_t stride) {
    for (std::int64_t r = 0; r < tiles()[kTile].rows; ++r) {
      std::memcpy(static_cast<char*>(p) + r * stride, tiles()[kTile].words[r], kTileRowBytes);
    }
  }
  template <int kSum, int kA, int kB>
  static void dot() {
    dot(tiles()[kSum], tiles()[kA], tiles()[kB]);
  }

 private:
  struct Tile {
    alignas(64) std::uint32_t words[16][16] = {};
    std::int64_t rows = 0;
  };

  static Tile* tiles() {
    static thread_local Tile all[8];
    return all;
  }

  // Even and odd products in fused chains of their own, then their sum to the tile; subnormal
  // operands and results are 0.
  __attribute__((noinline, target("avx2,fma"))) static void dot(Tile& sum, const Tile& a,
                                                                const Tile& b) {
    const unsigned control = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8040);  // nearest even, no exceptions; flush to zero, subnormals are zero
    for (std::int64_t m = 0; m < a.rows; ++m) {
      float even[16] = {}, odd[16] = {};
      for (int k = 0; k < 16; ++k) {
        const std::uint32_t pair = a.words[m][k];
        const float a_even = to_float(pair << 16), a_odd = to_float(pair & 0xffff0000);
        for (int n = 0; n < 16; ++n) {
          even[n] = __builtin_fmaf(a_even, to_float(b.words[k][n] << 16), even[n]);
          odd[n] = __builtin_fmaf(a_odd, to_float(b.words[k][n] & 0xffff0000), odd[n]);
        }
      }
      for (int n = 0; n < 16; ++n) {
        const float total = to_float(sum.words[m][n]) + (even[n] + odd[n]);
        std::memcpy(&sum.words[m][n], &total, sizeof total);
      }
    }
    _mm_setcsr(control);
  }

  __attribute__((always_inline)) static inline float to_float(std::uint32_t bits) {
    return std::bit_cast<float>(bits);
  }
};

}  // namespace keyfold::cpu::tiles

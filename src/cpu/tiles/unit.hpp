// The eight tile registers of Intel AMX, and whether this process may use them. Each tile is up to
// 16 rows of 64 bytes. The assembler forms of the intrinsics need no target attribute.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace keyfold::cpu::tiles {

inline constexpr std::int64_t kTileRows = 16;
inline constexpr std::int64_t kTileRowBytes = 64;
inline constexpr std::int64_t kTileBytes = kTileRows * kTileRowBytes;
/// Which tiles hold what: sums of the first 16 rows and of those behind, two each; first operands
/// of the two; second operands.
inline constexpr int kSums = 0, kFirst = 4, kSecond = 6;
/// Rows that products are computed for together.
inline constexpr std::int64_t kRowBlock = 2 * kTileRows;

/// Rows of tile i where `rows` of kRowBlock are there: sums and first operands can have fewer.
constexpr std::int64_t rows_of_tile(int i, std::int64_t rows) {
  const bool behind = i == kSums + 2 || i == kSums + 3 || i == kFirst + 1;
  if (i >= kSecond || (behind && rows <= kTileRows)) return kTileRows;
  return behind ? rows - kTileRows : std::min(rows, kTileRows);
}

/// Tile operations of the processor. Tiles are a thread's state: valid from configure() to
/// release(), and costly for whoever switches threads in between.
struct AmxUnit {
  /// As rows_of_tile() says.
  static void configure(std::int64_t rows) {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = static_cast<std::uint8_t>(rows_of_tile(i, rows));
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  /// Rows from p on, `stride` bytes apart.
  template <int kTile>
  static void load(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
  }
  /// sum[m][n] += over pairs k: a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1], elements of a
  /// and b bfloat16, sum float32.
  template <int kSum, int kA, int kB>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

/// Whether processor and system let this process use AMX for bfloat16. Asks Linux for permission.
inline bool amx_is_available() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr std::uint32_t kOsXsave = 1U << 27, kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsXsave) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr std::uint32_t kTileState = 3U << 17;  // configuration and data
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace keyfold::cpu::tiles

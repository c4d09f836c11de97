// The tile kernels, compiled where tiles are, and for AVX2 on emulated tiles.
#include "cpu/tiles/kernels.hpp"

#include "hwy/detect_compiler_arch.h"
#if HWY_ARCH_X86
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/tiles/kernels.cpp"
#include "hwy/foreach_target.h"  // must come before the -inl.hpp files

#include "cpu/tiles/emulated_unit.hpp"
#include "cpu/tiles/products-inl.hpp"  // for every target, as its include guard toggles

#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX2
HWY_BEFORE_NAMESPACE();
namespace keyfold::cpu::tiles {
namespace HWY_NAMESPACE {

template <class Unit, int kParts>
Kernels with_parts(Kernels kernels) {
  kernels.score_rows = nullptr;
  kernels.weigh_rows = nullptr;
  kernels.pack_q = pack_q<kParts>;
  kernels.pack_k = pack_k<kParts>;
  kernels.pack_v = pack_v<kParts>;
  kernels.score = score<Unit, kParts>;
  kernels.weigh = weigh<Unit, kParts>;
  kernels.weigh_exactly = weigh_exactly<Unit, kParts>;
  return kernels;
}

template <class Unit>
Kernels make_kernels(Kernels kernels, DType dtype, const char* name) {
  kernels.name = name;
  kernels.row_tile = kRowBlock;
  kernels.row_align = kRowBlock;
  kernels.words = words;
  kernels.softmax = softmax;
  return parts_of(dtype) == 2 ? with_parts<Unit, 2>(kernels) : with_parts<Unit, 1>(kernels);
}

Kernels make_emulated(const Kernels& vectors, DType dtype, const char* name) {
  return make_kernels<EmulatedUnit>(vectors, dtype, name);
}
#if HWY_TARGET == HWY_AVX3_DL
Kernels make_amx(const Kernels& vectors, DType dtype, const char* name) {
  return make_kernels<AmxUnit>(vectors, dtype, name);
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace keyfold::cpu::tiles
HWY_AFTER_NAMESPACE();
#endif
#endif  // HWY_ARCH_X86

#if HWY_ONCE || !HWY_ARCH_X86
namespace keyfold::cpu::tiles {

std::optional<Kernels> amx_kernels(const Kernels& vectors, DType dtype, const char* name) {
#if HWY_TARGETS & HWY_AVX3_DL
  static const bool available = amx_is_available();
  if (available) return N_AVX3_DL::make_amx(vectors, dtype, name);
#endif
  (void)vectors, (void)dtype, (void)name;
  return std::nullopt;
}

std::optional<Kernels> emulated_kernels(const Kernels& vectors, DType dtype, const char* name) {
#if HWY_TARGETS & HWY_AVX3_DL
  if ((hwy::SupportedTargets() & HWY_AVX3_DL) != 0) {
    return N_AVX3_DL::make_emulated(vectors, dtype, name);
  }
#endif
#if HWY_TARGETS & HWY_AVX2
  if ((hwy::SupportedTargets() & HWY_AVX2) != 0) {
    return N_AVX2::make_emulated(vectors, dtype, name);
  }
#endif
  (void)vectors, (void)dtype, (void)name;
  return std::nullopt;
}

}  // namespace keyfold::cpu::tiles
#endif  // HWY_ONCE

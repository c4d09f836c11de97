// Names that every kernel uses.
#pragma once

using uint = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;
template <bool kFirst, typename First, typename Second>
struct Conditional {
  using Type = First;
};
template <typename First, typename Second>
struct Conditional<false, First, Second> {
  using Type = Second;
};
template <bool kFirst, typename First, typename Second>
using conditional = typename Conditional<kFirst, First, Second>::Type;

#define DEVICE static __device__ __forceinline__

DEVICE uint shared_address(const void* p) { return static_cast<uint>(__cvta_generic_to_shared(p)); }

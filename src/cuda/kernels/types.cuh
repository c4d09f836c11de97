// Names of numbers. No kernel includes a header of CUDA: NVRTC alone has to suffice.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;

#define KEYFOLD_INLINE __device__ __forceinline__

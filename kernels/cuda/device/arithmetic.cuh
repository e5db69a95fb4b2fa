// Scalar instructions and warp reductions.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_

#include <cuda_bf16.h>

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// The same value, of which the compiler knows nothing: it cannot compute ahead of a loop, and keep
// in registers, what is derived from it.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A value that all lanes of the warp have, in a form that lets the compiler know it.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// 2^x to about 2 ulp; denormal results are zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); -infinity for zero and denormals.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to about 1 ulp; zero for infinity.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as bf16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// Over the four lanes that share a row of an mma accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Sums of kCount values over the warp (kLanes lanes of it) with little more than kCount shuffles:
// lane l gets the sum of value l / (32 / kCount). Every step leaves a lane with half of its values
// and half as many lanes with the same ones.
template <int kCount, int kLanes = 32>
__device__ __forceinline__ float warp_sums(const float (&x)[kCount]) {
  constexpr int kOther = kLanes / 2;
  if constexpr (kCount == 1) {
    float sum = x[0];
#pragma unroll
    for (int offset = kOther; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    return sum;
  } else {
    static_assert(kCount % 2 == 0 && kCount <= kLanes, "values halve with the lanes");
    constexpr int kHalf = kCount / 2;
    const bool upper = (threadIdx.x & kOther) != 0;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      half[i] = (upper ? x[i + kHalf] : x[i]) +
                __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + kHalf], kOther);
    }
    return warp_sums<kHalf, kOther>(half);
  }
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_

// Scalar instructions and warp reductions.
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_

#include <cuda_bf16.h>

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// Returns x, but hides from the compiler that it does. So values derived from it are computed where
// they are used, not ahead of a loop, where they would occupy registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Returns x, which must be the same in all lanes of the warp, and lets the compiler know that it
// is.
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

// The sum over the lanes of the warp; all of them get it.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sums of kCount values over the warp, or over each kLanes lanes of it, with little more than
// kCount shuffles. Lane l gets the sum of value l / (kLanes / kCount). At each step a lane hands
// half of its values to another lane, and takes over the other half of that lane's.
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

// The maximum over the lanes of the warp; all of them get it.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// Combines one value of each warp of the CTA, which all of that warp's lanes have; all threads of
// the CTA call it and get the result. `shared` has room for kWarps values; it may still be read by
// an earlier call.
template <int kWarps, typename Combine>
__device__ __forceinline__ float combine_warps(float of_warp, float* shared, Combine combine) {
  __syncthreads();  // the results of an earlier call have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_warp;
  __syncthreads();
  float result = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = combine(result, shared[warp]);
  return result;
}

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_ARITHMETIC_CUH_

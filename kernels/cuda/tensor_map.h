// Descriptions of tensors for the bulk copy engine (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_
#define PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace prefilld::kernels::cuda {

// A bf16 tensor [dims[2], dims[1], dims[0]] of which boxes [box2, box1, 64] are copied; with a
// fourth dimension, [dims[3], dims[2], dims[1], dims[0]] and boxes [1, box2, box1, 64].
struct TensorTiles {
  const void* data = nullptr;  // aligned to 16 bytes
  uint64_t dims[4] = {};       // innermost first; dims[3] 0: there are three
  uint64_t strides[3] = {};    // elements between steps along dims[1], .. ; multiples of 8
  uint32_t box1 = 1;
  uint32_t box2 = 1;
};

// Rows of 64 elements arrive as 128 bytes, swizzled in groups of eight rows (device/wgmma.cuh);
// what lies outside the tensor arrives as zero.
cudaError_t MakeTensorMap(const TensorTiles& tiles, CUtensorMap* map);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_

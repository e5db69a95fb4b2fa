// Describes tensors to the bulk copy engine (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_
#define PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace prefilld::kernels::cuda {

// A bf16 tensor and the boxes in which it is copied. The tensor is [dims[2], dims[1], dims[0]] and
// a box [box2, box1, 64]; with a fourth dimension, [dims[3], dims[2], dims[1], dims[0]] and [1,
// box2, box1, 64].
struct TensorTiles {
  const void* data = nullptr;  // aligned to 16 bytes
  uint64_t dims[4] = {};       // innermost first; dims[3] is 0 where there are three
  uint64_t strides[3] = {};    // elements between steps along dims[1] and on; multiples of 8
  uint32_t box1 = 1;
  uint32_t box2 = 1;
};

// Makes the description for the copy engine. Rows of 64 elements arrive as 128 bytes, swizzled in
// groups of eight rows (device/wgmma.cuh). Elements outside the tensor arrive as zero.
cudaError_t MakeTensorMap(const TensorTiles& tiles, CUtensorMap* map);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_TENSOR_MAP_H_

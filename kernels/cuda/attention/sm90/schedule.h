// In which order the persistent kernel takes its query tiles.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace prefilld::kernels::cuda::sm90 {

struct Launch;

// Scratch of OrderTiles for this many tiles.
size_t OrderScratchBytes(int num_tiles);

// Sets launch.order to tile ids in scratch memory: dense heads before sparse ones, KV heads in turn
// (their K and V then stay in L2 for all query heads of the group), and within a KV head the tiles
// with most key blocks first, so that none of the heavy ones comes last and leaves the GPU waiting.
cudaError_t OrderTiles(Launch& launch, void* scratch, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_

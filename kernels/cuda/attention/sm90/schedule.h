// Orders the query tiles of the persistent attention kernel.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace prefilld::kernels::cuda::sm90 {

struct Launch;

// The bytes of scratch memory that OrderTiles needs for this many tiles.
size_t OrderScratchBytes(int num_tiles);

// Sets block mass to zero, and launch.order to an array of tile ids in scratch memory:
// - dense heads before sparse ones;
// - among them, one KV head after the other, so that its K and V stay in L2 for all query heads
//   that read them;
// - within a KV head, the tiles with the most key blocks first, so that no heavy one comes last and
//   leaves the rest of the GPU waiting.
cudaError_t OrderTiles(Launch& launch, void* scratch, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_SCHEDULE_H_
